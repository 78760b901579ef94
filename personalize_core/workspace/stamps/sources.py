"""Which of our own sources the result of each step depends on, besides the method's own folder."""

from __future__ import annotations

# Whose source a step's result depends on, besides the method's own file. Not proof.py: it can refuse an artifact, but
# not change it.
ENCODING = (
    "concepts/image_files",
    "concepts/images",
    "concepts/preprocessing",
    "base_model/loading",
    "base_model/parts",
    "base_model/pretrained",
)
SHARED = (  # what several methods are made of
    "methods/shared/concept_embedding",
    "methods/shared/embedding_and_unet",
    "methods/shared/lag",
    "methods/shared/layer_modules",
    "methods/shared/low_rank",
    "methods/shared/merged_weights",
    "methods/shared/one_embedding",
    "methods/shared/training_batches",
    "methods/shared/tuned_weights",
)
MODEL = (  # the base model, and a method that is attached to it
    "base_model/attention",
    "base_model/blocks",
    "base_model/compiling",
    "base_model/hooks",
    "base_model/layers",
    "base_model/kept_prompts",
    "base_model/model",
    "base_model/prompt_reader",
    "base_model/prompt_variants",
    "base_model/text",
    "base_model/text_encoders",
    "base_model/transfer",
    "concepts/images",
    "methods/interface",
    *SHARED,
)
SAMPLING = (
    *MODEL,
    "sampling/frozen",
    "sampling/sampler",
)
# On top, for test-time optimization.
REFINING = ("methods/shared/context_regularizer", "sampling/test_time_optimization", "randomness")
# On top, for guidance with the base model's weights beside the learned ones.
GUIDING = ("sampling/weight_guidance",)
TRAINING = (
    *MODEL,
    "concepts/prompt_lists",
    "methods/shared/context_regularizer",
    "methods/training_prompts",  # a folder of lists, for all methods: which of them a method reads, its recipe decides
    "training/checkpoints",
    "training/loop",
    "training/micro_batches",
    "training/optimizers",
    "training/readings",
)
# On top, where a training ends when enough is learned.
WATCHING = (
    "concepts/held_out",
    "metrics/balance",
    "metrics/encoders",
    "metrics/faces",
    "metrics/preprocessing",
    "metrics/similarity",
    "metrics/weights",
    "sampling/frozen",
    "sampling/sampler",
    "sampling/some_images",
    "steps/probing",
    "training/fixed_inputs",
    "training/stopping",
    "training/watch",
)
ENCODERS = ("metrics/encoder_names", "metrics/encoders", "metrics/faces", "metrics/preprocessing", "metrics/weights")
SCORING = (
    *ENCODERS,
    "metrics/chunks",
    "metrics/features",
    "metrics/masc",
    "metrics/masks",
    "metrics/parquet",
    "metrics/references",
    "metrics/scoring",
    "metrics/similarity",
    "metrics/tables",
    "sampling/grid",
)
JUDGING = ("metrics/judge",)  # on top, where a judge is asked
EXTERNAL = ("external", "sampling/grid", "workspace/external_columns")
# What people read instead of identifiers; the methods' own display names are stamped by their values.
NAMING = ("report/display_names", "methods/shared/options")
COMPARING = (
    "metrics/concept_coverage",
    "metrics/costs",
    "metrics/held_out",
    "metrics/pairing",
    "metrics/parquet",
    "metrics/ranking",
    "metrics/statistics",
    "metrics/summaries",
    "metrics/tables",
    "report/comparison",
    "report/figures",
    *NAMING,
)
# And all of report/, its page among it.
REPORTING = (
    "metrics/balance",
    "metrics/concept_coverage",
    "metrics/ended_early",
    "metrics/held_out",
    "metrics/pairing",
    "metrics/parquet",
    "metrics/ranking",
    "metrics/statistics",
    "metrics/summaries",
    "metrics/tables",
    "report/figures",
    *NAMING,
)
