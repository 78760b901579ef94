"""Diffusers' training scripts, reproduced through the public API of diffusers, PEFT and accelerate.

Each does step by step what the script of its name does (huggingface/diffusers, examples/), with the same modules, the
same types and the same calls of accelerate. None of the scripts' text is copied. What differs: latents, noise and
timesteps are given, so that both sides have the same batch items; where a script would encode its images anew in every
step, this saves it the encoder's time.
"""
