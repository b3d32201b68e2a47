"""How the layers of this package are declared: frozen dataclasses that are pytrees."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def static(**kwargs: Any) -> Any:
    """A dataclass field that is structure (sizes, names, functions), not an array."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def layer(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen dataclass and registers it as a pytree: `static()` fields are structure, all others leaves."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))
