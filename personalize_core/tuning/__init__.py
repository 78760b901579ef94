"""A search over a method's recipe: `personalize tune`. docs/tuning.md says what it does and how far to believe it.

Its parts, in the order they are used: `request` (which concepts), `space` (which numbers, how far), `scratch` (a
workspace for each recipe), `measuring` (a recipe on a concept), `search` (Optuna: what to try next), `budget` (whether
there is time for it), `winner` (whether it is better), `results` and `plot` (what is written), `tune` (all of it).
"""
