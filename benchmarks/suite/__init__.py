"""Ours against what a user would pick, on identical work: `make bench`, or `python -m benchmarks.suite --help`.

Training steps, sampling, scoring and whole cells take turns with diffusers' training scripts, PEFT, the stock pipeline
at its best batch size and open_clip. Both sides have the same weights, batch items, steps, images and precision; how
far their results differ stands beside each ratio. The training steps of every method also take turns with the U-Net
alone (`--only bare`). The floor is the counted arithmetic at the device's measured matrix
rate: no implementation of this work can take less.
"""
