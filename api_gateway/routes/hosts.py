"""Hosts: announcing, enrolling, maintaining them, and their networks."""

from __future__ import annotations

from api_gateway.route import Route
from volery.contracts import cluster as c
from volery.contracts import host as h
from volery.contracts import host_devices as d
from volery.contracts import network as n

HOSTS = "Hosts"

ROUTES = (
    Route("GET", "/hosts", h.LIST_HOSTS, HOSTS, "List hosts", items=h.Host,
          expands={"cluster": ("cluster_id", c.GET_CLUSTER)}),
    Route("POST", "/hosts", h.CREATE_HOST, HOSTS, "Announce a host", at="/hosts",
          note="Answers a one-time token: run `command` on the host, which then enrols itself."),
    Route("GET", "/hosts/{id}", h.GET_HOST, HOSTS, "Get a host"),
    Route("PATCH", "/hosts/{id}", h.UPDATE_HOST, HOSTS, "Change a host"),
    Route("DELETE", "/hosts/{id}", h.DELETE_HOST, HOSTS, "Remove a host",
          note="It must be in maintenance; its credentials are revoked at once."),
    Route("POST", "/hosts/{id}/enrolment-token", h.RENEW_HOST_TOKEN, HOSTS, "Give a host a new one-time token"),
    Route("POST", "/hosts/{id}/maintenance", h.MAINTAIN_HOST, HOSTS, "Move a host's VMs away and leave it alone"),
    Route("POST", "/hosts/{id}/activate", h.ACTIVATE_HOST, HOSTS, "Use a host again"),
    Route("POST", "/hosts/{id}/save-power", h.SAVE_POWER, HOSTS, "Move a host's VMs away and switch it off to save power",
          note="Through its BMC, which must have passed its test. It sleeps until it is woken, or activated."),
    Route("POST", "/hosts/{id}/wake", h.WAKE_HOST, HOSTS, "Switch a sleeping host on and use it again",
          note="It ends when the host has reported."),
    Route("GET", "/hosts/{id}/devices", d.LIST_HOST_DEVICES, HOSTS, "List devices of a host that VMs can have",
          note="With the VMs that have them, and why the host keeps others (`reason`). A VM gets them by its `host_devices`."),
    Route("GET", "/hosts/{id}/networks", n.LIST_ATTACHMENTS, HOSTS, "List which NICs of a host carry which networks",
          items=n.Attachment, renamed={"id": "host_id"}),
    Route("POST", "/hosts/{id}/networks", n.SETUP_HOST_NETWORKS, HOSTS, "Set which NICs of a host carry which networks",
          renamed={"id": "host_id"},
          note="Applied by the host with a check that the control plane is still reachable, rolled back if not."),
)  # fmt: skip
