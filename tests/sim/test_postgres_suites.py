"""Suites of the services again, each statement on the real PostgreSQL and on the simulation's at once."""

# ruff: noqa: F401

from __future__ import annotations

from tests.ha.test_restarts import test_repeated_crashes_are_answered_slower_and_in_the_end_no_more
from tests.inventory.test_basics import test_data_center_and_cluster, test_login_and_token
from tests.inventory.test_requests import test_stale_edits_and_unknown_things_are_refused
from tests.runtime.test_service import (
    test_a_cancelled_operation_learns_what_came_of_its_step_before_it_undoes_anything,
    test_a_deleted_stream_comes_back_whole,
    test_a_request_id_is_answered_once,
    test_an_operation_ends_and_frees_its_object,
    test_concurrent_changes_keep_order_without_gaps,
    test_create_get_list_and_facts_in_order,
)
from tests.scheduler.test_placing import (
    test_a_restarted_scheduler_knows_its_fleet_and_claims,
    test_a_vm_is_placed_claimed_confirmed_and_released,
    test_racing_placements_of_one_vm_claim_once,
)
