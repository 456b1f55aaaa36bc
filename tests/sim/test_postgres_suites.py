"""Suites of the services again, each statement on the real PostgreSQL and on the simulation's at once."""

from __future__ import annotations

from tests.ha.test_restarts import (
    test_a_crash_is_answered_at_once_and_once,
    test_repeated_crashes_are_answered_slower_and_in_the_end_no_more,
)
from tests.inventory.test_basics import (
    test_data_center_and_cluster,
    test_login_and_token,
)
from tests.inventory.test_requests import (
    test_a_thousand_identical_creates_make_one_vm,
    test_bad_input_is_refused_and_leaves_nothing,
    test_stale_edits_and_unknown_things_are_refused,
)
from tests.runtime.test_service import *  # noqa: F403
from tests.scheduler.test_placing import (
    test_a_decision_is_readable_later_as_it_was_explained,
    test_a_repeat_gets_the_first_answer_with_or_without_its_request_id,
    test_a_restarted_scheduler_knows_its_fleet_and_claims,
    test_a_scheduler_that_missed_every_fact_lists_its_owners,
    test_a_vm_is_placed_claimed_confirmed_and_released,
    test_racing_placements_of_one_vm_claim_once,
    test_the_fleet_follows_hosts_clusters_and_networks,
)
