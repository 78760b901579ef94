"""A cron expression is taken exactly if Dagster, which goes by it, takes it."""

from __future__ import annotations

import pytest

from personalize_core.workspace.cron import check_cron

GOOD = ["0 2 * * *", "*/15 * * * *", "0 0-6/2 1,15 jan-mar mon", "59 23 31 12 7", "0 2 * * sun,sat", "0 2 * * MON-FRI"]
BAD = ["at night", "", "* * * *", "60 * * * *", "0 24 * * *", "0 2 0 * *", "0 2 * 13 *", "0 2 * * 8", "a * * * *",
       "*-3 * * * *", "5-1 * * * *", "*/0 * * * *", "0 2 * * funday", "-1 * * * *", "0 2 * * \u0663"]  # fmt: skip


@pytest.mark.parametrize("expression", GOOD)
def test_what_dagster_takes_is_taken(expression):
    import dagster as dg

    assert check_cron(expression) == expression
    assert dg.ScheduleDefinition("any", job_name="any", cron_schedule=expression).cron_schedule == expression


def test_dagster_refuses_what_is_no_cron_expression_when_a_schedule_is_defined():
    import dagster as dg

    with pytest.raises(dg.DagsterInvalidDefinitionError):
        dg.ScheduleDefinition("any", job_name="any", cron_schedule="60 * * * *")


@pytest.mark.parametrize("expression", BAD)
def test_what_is_no_cron_expression_is_refused_with_an_example(expression):
    with pytest.raises(ValueError, match="such as '0 2"):
        check_cron(expression)
