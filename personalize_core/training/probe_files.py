"""The files beside an artifact that say what was seen of its training."""

PROBES, PROBE_CURVES, PROBE_IMAGES = "probes.parquet", "probes.png", "probe_images.png"
ENDED = "stages.json"  # how many steps each stage took, of how many, and which moment of it was kept
