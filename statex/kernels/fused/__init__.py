"""The recurrences as Triton kernels, for CUDA devices: same calls, same results as the chunked PyTorch forms.

`blocks` holds the matrix products that both recurrences share, `gated` what decays per key channel, `by_head` what decays per head,
`rows` lifted and mixed keys and queries, `layout` the choice of chunks, segments, tiles and operand types; `gla` and `ssd` put them
together, `step`, `delta_step` and `scan_step` are one token of generation. `delta_kernels`, `delta_gradients` and `delta` are the
delta rule's, `scan_kernels` and `selective_scan` Mamba's, which has no products, and `hgrn` is HGRN's. `pointwise`,
`convolution` and `decay_gate` are what surrounds a recurrence in a layer, `linear_loss` is the head with the loss, `together`
compiles the kernels of a pass side by side. Importing this package needs Triton.
"""
