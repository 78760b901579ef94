"""When the cheap ends of the graph are made anew without being asked for."""

import dagster as dg

_when = dg.AutomationCondition

# Dagster's own `eager` never fires while any partition above is missing or has failed; and one broken concept should
# stop no comparison.
AFTER_SCORES = (
    _when.any_deps_updated().since_last_handled() & ~_when.any_deps_in_progress() & ~_when.in_progress()
).with_label("scores have changed, and no cell is waiting or running")
WITH_COMPARISON = _when.any_deps_match(_when.will_be_requested()).with_label("the comparison is made anew")
