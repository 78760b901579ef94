"""The steps from concept images to a comparison: files in, files out.

Every step is a pure function of its stamp: what it would make, it finds already made or makes anew, and nobody
ever sees it half made. Dagster, DVC and the command line call these and hold no logic of their own.
"""

from personalize_core.sampling.grid import image_name
from personalize_core.steps import result_checks
from personalize_core.steps.agreeing_with_people import study_agreement
from personalize_core.steps.analyses import ANALYSES, analyse, analyse_together, analysed, suggest_class
from personalize_core.steps.canary import (
    accept_canary,
    canary_cells,
    moved,
    noise_band,
    run_canary,
    upgrades,
    why_canary,
)
from personalize_core.steps.class_images import make_class_images
from personalize_core.steps.comparing import compare
from personalize_core.steps.estimating import estimate, long_work_notice
from personalize_core.steps.events import Event, Listener, Report, unheard
from personalize_core.steps.exchange import export, export_peft, import_artifact
from personalize_core.steps.explaining import explain
from personalize_core.steps.external import add_external, list_external, score_external
from personalize_core.steps.finding import (
    Place,
    bytes_of,
    found_report,
    is_scored,
    results_there,
    seconds_since,
    why_out_of_date,
)
from personalize_core.steps.input_checks import check_inputs, problems_of, problems_of_workspace
from personalize_core.steps.latents import encode_images
from personalize_core.steps.planning import Cell, earlier_version_notice, is_prepared, plan
from personalize_core.steps.repeating import check_repeatable
from personalize_core.steps.reporting import report
from personalize_core.steps.requested_images import heat_maps, sample_between, sample_prompts, sample_several_concepts
from personalize_core.steps.sampling import sample_grid
from personalize_core.steps.score_lineage import Rows
from personalize_core.steps.scores import score, score_references
from personalize_core.steps.training import train
from personalize_core.workspace.lineage.link import Link
from personalize_core.workspace.recipes import check_concepts_wanted, class_images_wanted, concepts_wanted, processes_of
from personalize_core.workspace.stamps.sampling import sampling_stamp
from personalize_core.workspace.stamps.scoring import scoring_stamp
from personalize_core.workspace.stamps.training import recipe_stamp

__all__ = [
    "ANALYSES",
    "Cell",
    "Event",
    "Link",
    "Listener",
    "Place",
    "Report",
    "Rows",
    "accept_canary",
    "add_external",
    "analyse",
    "analyse_together",
    "analysed",
    "bytes_of",
    "canary_cells",
    "check_concepts_wanted",
    "check_inputs",
    "check_repeatable",
    "class_images_wanted",
    "compare",
    "earlier_version_notice",
    "concepts_wanted",
    "sample_grid",
    "sample_between",
    "sample_prompts",
    "sample_several_concepts",
    "encode_images",
    "estimate",
    "explain",
    "found_report",
    "export",
    "export_peft",
    "result_checks",
    "heat_maps",
    "import_artifact",
    "is_prepared",
    "is_scored",
    "list_external",
    "long_work_notice",
    "make_class_images",
    "moved",
    "noise_band",
    "image_name",
    "plan",
    "problems_of",
    "problems_of_workspace",
    "processes_of",
    "recipe_stamp",
    "report",
    "results_there",
    "run_canary",
    "sampling_stamp",
    "score",
    "score_external",
    "score_references",
    "scoring_stamp",
    "seconds_since",
    "study_agreement",
    "suggest_class",
    "train",
    "unheard",
    "upgrades",
    "why_canary",
    "why_out_of_date",
]
