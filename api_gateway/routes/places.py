"""Data centers, clusters and templates."""

from __future__ import annotations

from api_gateway.route import Route
from volery.contracts import cluster as c
from volery.contracts import template as t

DATA_CENTERS, CLUSTERS, TEMPLATES = "Data centers", "Clusters", "Templates"

ROUTES = (
    Route("GET", "/data-centers", c.LIST_DATA_CENTERS, DATA_CENTERS, "List data centers", items=c.DataCenter),
    Route("POST", "/data-centers", c.CREATE_DATA_CENTER, DATA_CENTERS, "Create a data center", at="/data-centers"),
    Route("GET", "/data-centers/{id}", c.GET_DATA_CENTER, DATA_CENTERS, "Get a data center"),
    Route("PATCH", "/data-centers/{id}", c.UPDATE_DATA_CENTER, DATA_CENTERS, "Change a data center"),
    Route("DELETE", "/data-centers/{id}", c.DELETE_DATA_CENTER, DATA_CENTERS, "Delete an empty data center"),
    Route("GET", "/clusters", c.LIST_CLUSTERS, CLUSTERS, "List clusters", items=c.Cluster,
          expands={"data_center": ("data_center_id", c.GET_DATA_CENTER)}),
    Route("POST", "/clusters", c.CREATE_CLUSTER, CLUSTERS, "Create a cluster", at="/clusters"),
    Route("GET", "/clusters/{id}", c.GET_CLUSTER, CLUSTERS, "Get a cluster"),
    Route("PATCH", "/clusters/{id}", c.UPDATE_CLUSTER, CLUSTERS, "Change a cluster"),
    Route("DELETE", "/clusters/{id}", c.DELETE_CLUSTER, CLUSTERS, "Delete an empty cluster"),
    Route("POST", "/clusters/{id}/upgrade", c.UPGRADE_CLUSTER, CLUSTERS, "Upgrade a cluster's hosts one after the other",
          note="Each is emptied and put into maintenance; the operation then waits until somebody has upgraded and activated it "
               "(`POST /hosts/{id}/activate`), and goes on with the next. `?dry_run=true` shows the order of hosts, and where "
               "each VM goes in whose turn."),
    Route("GET", "/templates", t.LIST_TEMPLATES, TEMPLATES, "List templates", items=t.Template),
    Route("GET", "/templates/{id}", t.GET_TEMPLATE, TEMPLATES, "Get a template"),
)  # fmt: skip
