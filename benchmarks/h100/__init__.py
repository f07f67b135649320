"""A model of the time that a Triton kernel takes on an H100, from its machine code alone; no GPU is needed.

``machine_code`` reads a cubin. ``emulator`` runs single programs of a launch: integers, predicates and addresses
exactly, floats unknown. ``records`` makes of that what each warp issues, and ``simulator`` runs the warps of one
processor. ``model`` puts these together; ``machine`` has the numbers of the GPU.
"""
