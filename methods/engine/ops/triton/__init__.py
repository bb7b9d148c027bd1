"""Sparse execution on an accelerator: each operation beside its PyTorch reference.

No operation waits for the device: how many tokens are executed is known to the kernels only,
grids are sized for all of them, and programs without work leave before they read a weight. All
can be captured in a CUDA graph, after one ordinary call (it compiles and picks tile sizes).
`torch.compile` calls them as they are, between its graphs. For inference: none has a gradient.

Shapes: B sequences, T tokens of this forward, N = B * T rows, D model width, F MLP width, H heads,
K key-value heads, d head width, S slots of the cache, O outputs, I inputs, r rank.
"""
