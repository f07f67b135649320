"""The operator's GPU kernels, in Triton. Imported when the first of them runs, so that the package works without it.

chunk.py             launches of the chunkwise form, forward and backward
prepare.py           kernel: what of a chunk does not depend on the state
scan.py              kernels: the state from chunk to chunk, and its gradient back
fold.py              kernel: the states between segments
gradient.py          kernel: every gradient of a chunk that needs no other chunk
decays.py, rows.py   device functions: decays between tokens; rows of inputs, activated
matrices.py          the matrices that sums of decays are products with
recurrent.py         kernel: token by token, for decoding
configurations.py    candidates for the chunk kernels, by architecture, dtype and head sizes
"""
