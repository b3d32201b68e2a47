"""Steps of networks at the sizes at which people train them, compiled for GPUs and TPUs that are not here.
`python -m experiments.targets`.

Every network of `networks`, for each target, by each method: backpropagation; `jax.checkpoint` on every
layer, on every layer but for its products (`dots_saveable`), on segments of the square root of the depth; and
our plans at several budgets, of single steps (no `mw.fit`), tied, loose and untied. Of each the temporaries,
predicted and compiled, kernels, traffic, and the modelled time: all of it what compilers say, to the last
digit, however busy the machine is. What a device would really take is not seen here.

`--fast 1`: GPT for the GPU at three budgets, about ten minutes on two cores. Points that are in the records
are not computed again. A target whose compiler is not installed is left out, and said to be; GPUs' and TPUs'
need an environment each. Writes results/targets/."""
