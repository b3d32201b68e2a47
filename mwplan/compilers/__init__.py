"""What a compiler made of a program.

Options under which plans hold, temporaries, buffers. Imports `common`, `plans`, `network`.
"""
