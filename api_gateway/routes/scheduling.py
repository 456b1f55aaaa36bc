"""What the scheduler holds and decided, what ha knows, and what was."""

from __future__ import annotations

from api_gateway import licences
from api_gateway.openapi_parts import parameter, text_of
from api_gateway.route import Route, Special
from volery.contracts import affinity_group as a
from volery.contracts import history as y
from volery.contracts import liveness as l
from volery.contracts import plan as n
from volery.contracts import promise as m
from volery.contracts import protection as p
from volery.contracts import scheduling as s
from volery.contracts import scheduling_policy as c
from volery.contracts import start_group as g

SCHEDULING, LIVENESS, HISTORY = "Scheduling", "Liveness", "History"

ROUTES = (
    Route("GET", "/claims", s.LIST_CLAIMS, SCHEDULING, "List claims: capacity held for VMs", items=s.Claim),
    Route("GET", "/capacity", s.LIST_CAPACITY, SCHEDULING, "List hosts as the scheduler sees them", items=s.HostCapacity),
    Route("GET", "/decisions", s.LIST_DECISIONS, SCHEDULING, "List past placement decisions, the newest first",
          items=s.PastDecision, note="They are kept for a week (`VOLERY_SCHEDULER_DECISION_DAYS`)."),
    Route("GET", "/decisions/{id}", s.GET_DECISION, SCHEDULING, "Get a past placement decision, as it was explained"),
    Route("GET", "/affinity-groups", a.LIST_AFFINITY_GROUPS, SCHEDULING, "List affinity groups", items=a.AffinityGroup,
          note="`filter.cluster_id=…`, `filter.vm_id=…` or `filter.host_id=…` for the groups of a cluster, or those that "
               "name a VM or host. `broken` says how running VMs break a group's rules now."),
    Route("POST", "/affinity-groups", a.CREATE_AFFINITY_GROUP, SCHEDULING, "Create an affinity group", at="/affinity-groups",
          note="Which VMs run together (`vm_rule: positive`) or apart (`negative`), and on which hosts (`host_rule`). "
               "Enforcing rules are kept by every start and migration, others are wishes. A group that contradicts others "
               "is refused with their names. VMs that run already are not moved: `broken` names them."),
    Route("GET", "/affinity-groups/{id}", a.GET_AFFINITY_GROUP, SCHEDULING, "Get an affinity group"),
    Route("PATCH", "/affinity-groups/{id}", a.UPDATE_AFFINITY_GROUP, SCHEDULING, "Change an affinity group"),
    Route("DELETE", "/affinity-groups/{id}", a.DELETE_AFFINITY_GROUP, SCHEDULING, "Delete an affinity group"),
    Route("GET", "/scheduling-policies", c.LIST_SCHEDULING_POLICIES, SCHEDULING, "List scheduling policies",
          items=c.SchedulingPolicy, note="`filter.built_in=false` for those that administrators made."),
    Route("POST", "/scheduling-policies", c.CREATE_SCHEDULING_POLICY, SCHEDULING, "Create a scheduling policy",
          at="/scheduling-policies",
          note="What isn't given is as in `copy_of`, or as in the built-in evenly_distributed. "
               "`GET /scheduling-policy-units` has what policies are made of."),
    Route("GET", "/scheduling-policies/{id}", c.GET_SCHEDULING_POLICY, SCHEDULING, "Get a scheduling policy"),
    Route("PATCH", "/scheduling-policies/{id}", c.UPDATE_SCHEDULING_POLICY, SCHEDULING, "Change a scheduling policy",
          note="The next placement in its clusters goes by it. Lists and tables that are given replace what there was. "
               "Built-in ones can't be changed."),
    Route("DELETE", "/scheduling-policies/{id}", c.DELETE_SCHEDULING_POLICY, SCHEDULING,
          "Delete a scheduling policy that no cluster has"),
    Route("GET", "/scheduling-policy-units", c.LIST_POLICY_UNITS, SCHEDULING,
          "List what scheduling policies are made of: filters, weights, balances and their parameters"),
    Route("GET", "/clusters/{id}/scheduling-policy", c.GET_CLUSTERS_POLICY, SCHEDULING,
          "Get the scheduling policy that holds for a cluster",
          note="The one that it was given, or the built-in one of its `balance`."),
    Route("GET", "/clusters/{id}/balance", c.GET_CLUSTER_BALANCE, SCHEDULING,
          "Get which hosts of a cluster have too much, and which have room",
          note="By the balance of the cluster's scheduling policy. Nothing is moved for it."),
    Route("POST", "/clusters/{id}/balance", n.MAKE_PLAN, SCHEDULING, "Balance a cluster",
          renamed={"id": "cluster_id"}, fixed={"kind": n.PlanKind.BALANCE}, hidden=("host_ids",), body_name="BalanceCluster",
          note="A plan is computed as a whole, by what the cluster's scheduling policy balances, and carried out. "
               "`?dry_run=true` only shows it, in the operation's `result`."),
    Route("GET", "/plans", n.LIST_PLANS, SCHEDULING, "List plans", items=n.Plan,
          note="`filter.cluster_id=…`, `filter.kind=…`, `filter.state=running`. Those that ended are kept for a month "
               "(`VOLERY_SCHEDULER_PLAN_DAYS`)."),
    Route("POST", "/plans", n.MAKE_PLAN, SCHEDULING, "Make a plan and carry it out",
          note="Of the kind `balance`, `affinity` (broken affinity groups are mended) or `evacuation` (the hosts `host_ids` "
               "are emptied). Every step is legal in its order, and none makes it worse. `?dry_run=true` only shows it, in "
               "the operation's `result`. A VM or host is in one active plan at a time: what goes before another kind takes "
               "its place, anything else is refused with the plan's id."),
    Route("GET", "/plans/{id}", n.GET_PLAN, SCHEDULING, "Get a plan, with how far its steps are"),
    Route("POST", "/plans/{id}/cancel", n.CANCEL_PLAN, SCHEDULING, "Cancel a plan",
          note="What is on its way arrives; nothing more begins. Answers with the operation that carries it out."),
    Route("POST", "/clusters/{id}/scheduling-policy", c.GIVE_SCHEDULING_POLICY, SCHEDULING,
          "Give a cluster a scheduling policy", renamed={"id": "cluster_id"},
          note="It takes the place of the one that the cluster had; `\"policy_id\": \"\"` is the built-in one of its "
               "`balance` again. The next placement goes by it. Answers with the policy that holds now."),
    Route("GET", "/vms/{id}/decisions", s.LIST_DECISIONS, SCHEDULING, "List where a VM was placed, the newest first",
          items=s.PastDecision, renamed={"id": "vm_id"}),
    Route("GET", "/liveness", l.LIST_LIVENESS, LIVENESS, "List what is known of hosts' liveness", items=l.HostLiveness),
    Route("GET", "/liveness/{id}", l.GET_LIVENESS, LIVENESS, "Get what is known of one host's liveness"),
    Route("GET", "/restarts", l.LIST_RESTARTS, LIVENESS, "List automatic restarts", items=l.VmRestart),
    Route("GET", "/protection", p.LIST_PROTECTION, LIVENESS, "List highly available VMs: protected or why not",
          items=p.VmProtection,
          note="`filter.cluster_id=…` for one cluster, `filter.protected=false` for those whose host's death would not "
               "bring them back elsewhere. Each reason has the smallest change that mends it."),
    Route("GET", "/vms/{id}/protection", p.GET_PROTECTION, LIVENESS, "Get whether a VM is protected, or why not",
          note="Only highly available VMs have one."),
    Route("GET", "/reserves", p.LIST_RESERVES, LIVENESS, "List clusters that reserve room for hosts that die",
          items=p.ClusterReserve,
          note="Clusters with `reserve_host_failures`. `filter.kept=false` for those that would have no room."),
    Route("GET", "/clusters/{id}/reserve", p.GET_RESERVE, LIVENESS, "Get whether a cluster keeps its reserve"),
    Route("GET", "/promises", m.LIST_PROMISES, LIVENESS, "List clusters that promise to survive the loss of hosts",
          items=m.ClusterPromise,
          note="Clusters with `reserve_host_failures` whose `admission_control` is warn or enforce. `filter.kept=false` for "
               "those whose promise doesn't hold now."),
    Route("GET", "/clusters/{id}/protection", m.GET_PROMISE, LIVENESS,
          "Get whether a cluster would survive the loss of hosts, as it promises",
          note="Checked by placing every highly available VM of the hosts on what is left. `breaking` has the losses that it "
               "would not survive, with the VMs that would have no place and why."),
    Route("POST", "/clusters/{id}/what-if", m.LOSE_HOSTS, LIVENESS,
          "Get where VMs would go if hosts of a cluster were lost together",
          note="`host_ids` are the hosts. Nothing is changed. VMs without a place come first, each with the reason."),
    Route("GET", "/start-groups", g.LIST_START_GROUPS, LIVENESS, "List start groups", items=g.StartGroup),
    Route("POST", "/start-groups", g.CREATE_START_GROUP, LIVENESS, "Create a start group", at="/start-groups",
          note="Its VMs are brought back once every VM of the groups in `after` that is being brought back runs, answers "
               "by its guest agent, or the group's `wait_seconds` have passed. A circle is refused and named."),
    Route("GET", "/start-groups/{id}", g.GET_START_GROUP, LIVENESS, "Get a start group"),
    Route("PATCH", "/start-groups/{id}", g.UPDATE_START_GROUP, LIVENESS, "Change a start group"),
    Route("DELETE", "/start-groups/{id}", g.DELETE_START_GROUP, LIVENESS, "Delete a start group that none comes after"),
    licences.ROUTE,
    Special("GET", "/licence-report.csv", licences.table, SCHEDULING, "Get the licence report as a table",
            parameters=tuple(parameter(name, {"type": "string"}) for name in licences.QUERY), refuses=(400, 503, 504),
            note="One row per VM and time, with the names of the columns first.",
            responses={200: text_of("text/csv", "Every row that fits the question")}),
    Route("GET", "/history/versions", y.LIST_VERSIONS, HISTORY, "List versions of configuration",
          query=("noun", "id", "at", "limit", "page")),
    Route("GET", "/history/samples", y.QUERY_SAMPLES, HISTORY, "Get samples or aggregates of an object",
          query=("noun", "id", "interval", "since", "until", "limit")),
    Route("GET", "/history/gaps", y.LIST_GAPS, HISTORY, "List times in which facts were lost"),
)  # fmt: skip
