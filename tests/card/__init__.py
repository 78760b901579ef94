"""A pretended graphics card: tensors that say they lie on cuda:0, at true shapes and with real numbers, on a CPU.

A pytest session of its own (`make test-card`), because its device guard must be loaded before torch is imported.
"""
