"""Power management of hosts, fencing, and a person's word that a host is off."""

from __future__ import annotations

from api_gateway.route import Route
from volery.contracts import power as p
from volery.contracts import soft_fence as s

POWER, FENCING = "Power management", "Fencing"

ROUTES = (
    Route("GET", "/power-management", p.LIST_POWER_MANAGEMENT, POWER, "List hosts' power management",
          items=p.PowerManagement),
    Route("GET", "/hosts/{id}/power-management", p.GET_POWER_MANAGEMENT, POWER, "Get a host's power management",
          note="Secrets are never shown."),
    Route("PUT", "/hosts/{id}/power-management", p.SET_POWER_MANAGEMENT, POWER, "Set a host's power management",
          note="Replaces all of it, and tests it in the background: see `identity`, `test_passed` and `test_words`. "
               "`secrets` that are left out are kept for the same agent at the same address and port. With `kdump_addresses` "
               "power waits while the host's crash kernel tells from there that it writes a dump; with `kdump_proves` that "
               "is the proof of its death: only where no guest can send by that network.",
          example={"devices": [{"agent": "fence_redfish", "address": "10.0.9.7", "username": "volery",
                                "secrets": {"password": "…"}, "options": {"ssl_insecure": "1"}}]}),
    Route("DELETE", "/hosts/{id}/power-management", p.DELETE_POWER_MANAGEMENT, POWER, "Forget a host's power management",
          note="It is never fenced from now on: when it falls silent a person is asked."),
    Route("POST", "/hosts/{id}/power-management/test", p.TEST_POWER_MANAGEMENT, POWER, "Test a host's power management",
          note="Asks every device whose machine it is and whether that is on. Switches nothing."),
    Route("POST", "/hosts/{id}/power", p.SWITCH_POWER, POWER, "Switch a host's power by hand, or read it",
          note="`off` ends the VMs that run there, and needs the host's name as `confirm` unless it is in maintenance. "
               "Between two switches three minutes pass."),
    Route("POST", "/hosts/{id}/confirm-rebooted", p.CONFIRM_HOST_REBOOTED, FENCING,
          "Confirm that a host is off, or was rebooted",
          note="Proof of death: what ran there is started elsewhere, and would run twice if the host lived. Needs its "
               "name as `confirm`; refused while there is a sign of life."),
    Route("GET", "/fencing", p.GET_FENCING, FENCING, "How things are with fencing",
          note="Pauses, the brake of each cluster, and silent hosts with the reason why nothing is done about them."),
    Route("POST", "/fencing/pause", p.PAUSE_FENCING, FENCING, "Pause fencing: everywhere, of a cluster, of a host",
          note="It ends by itself after `seconds`. Proofs of death count all the same."),
    Route("POST", "/fencing/resume", p.RESUME_FENCING, FENCING, "End a pause of fencing"),
    Route("GET", "/fencing/pauses", p.LIST_FENCING_PAUSES, FENCING, "List pauses of fencing", items=p.FencingPause),
    Route("GET", "/clusters/{id}/fencing-policy", p.GET_FENCING_POLICY, FENCING, "Get a cluster's fencing policy",
          note="The defaults, at revision 0, where none was set."),
    Route("PUT", "/clusters/{id}/fencing-policy", p.SET_FENCING_POLICY, FENCING, "Set a cluster's fencing policy",
          note="Which silent hosts are spared. What is left out is the default. To switch fencing off for a while, pause "
               "it for the cluster.",
          example={"skip_while_lease_alive": True, "skip_if_connectivity_broken": True,
                   "connectivity_broken_percent": 50, "skip_while_peers_answer": True}),
    Route("GET", "/fencing-policies", p.LIST_FENCING_POLICIES, FENCING, "List the fencing policies that were set",
          items=p.FencingPolicy),
    Route("GET", "/soft-fencing", s.LIST_SOFT_FENCES, FENCING, "List hosts whose agent may be restarted over SSH",
          items=s.SoftFence),
    Route("GET", "/hosts/{id}/soft-fencing", s.GET_SOFT_FENCE, FENCING, "Get a host's soft fencing",
          note="`authorized_key` is the line for its authorized_keys. The private key is never shown."),
    Route("PUT", "/hosts/{id}/soft-fencing", s.SET_SOFT_FENCE, FENCING, "Let a silent host's agent be restarted over SSH",
          note="Tried once before its power is touched; proves nothing. ha makes a key pair of its own for the host.",
          example={"address": "10.0.0.7", "host_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI…"}),
    Route("DELETE", "/hosts/{id}/soft-fencing", s.DELETE_SOFT_FENCE, FENCING, "Forget a host's soft fencing, and ha's key for it"),
    Route("POST", "/hosts/{id}/soft-fencing/test", s.TEST_SOFT_FENCE, FENCING, "Log in to a host over SSH, and out again",
          note="Runs nothing."),
    Route("GET", "/fence-records", p.LIST_FENCE_RECORDS, FENCING, "List what was switched, when, and what the devices said",
          items=p.FenceRecord),
)  # fmt: skip
