"""Nova's own filters and weighers, in its environment: decides what is asked on standard input, line by line.

The first line is the world: hosts, multipliers of the weighers. Every further line is one request; the answer says how long
filtering and weighing took, which host came first, and what the host that the asker names was worth. Nothing of Volery is
imported here, and nothing of Nova is replaced but what reads its database: the list of hosts is given.
"""

import datetime
import json
import sys
import time
import warnings

warnings.simplefilter("ignore")

import nova.conf  # noqa: E402
from nova import objects  # noqa: E402
from nova.scheduler import host_manager  # noqa: E402

CONF = nova.conf.CONF
FILTERS = [
    "ComputeFilter",
    "ComputeCapabilitiesFilter",
    "ImagePropertiesFilter",
    "ServerGroupAntiAffinityFilter",
    "ServerGroupAffinityFilter",
]
"""Its defaults."""
WEIGHERS = [
    "nova.scheduler.weights.ram.RAMWeigher",
    "nova.scheduler.weights.metrics.MetricsWeigher",
    "nova.scheduler.weights.num_instances.NumInstancesWeigher",
    "nova.scheduler.weights.affinity.ServerGroupSoftAffinityWeigher",
    "nova.scheduler.weights.affinity.ServerGroupSoftAntiAffinityWeigher",
]
ALL_WEIGHERS = ["nova.scheduler.weights.all_weighers"]
"""Its default, all thirteen: measured beside the five."""


class Hosts(host_manager.HostManager):
    """Without a database: who calls gives the hosts."""

    def refresh_cells_caches(self):
        self.cells = {}

    def _init_aggregates(self):
        pass

    def _init_instance_info(self, computes_by_cell=None):
        pass


def configure(world):
    CONF([], project="nova", default_config_files=[])
    CONF.set_override("service_down_time", 86400)
    CONF.set_override("enabled_filters", FILTERS, "filter_scheduler")
    CONF.set_override("ram_weight_multiplier", world["ram"], "filter_scheduler")
    CONF.set_override("num_instances_weight_multiplier", world["instances"], "filter_scheduler")
    CONF.set_override("weight_setting", ["cpu.percent=-1.0"], "metrics")
    CONF.set_override("weight_multiplier", world["cpu"], "metrics")


def manager(weighers):
    CONF.set_override("weight_classes", weighers, "filter_scheduler")
    return Hosts()


def states(world):
    now = datetime.datetime.now(datetime.UTC)
    made = []
    for host in world["hosts"]:
        state = host_manager.HostState(host["name"], host["name"], "cell")
        state.free_ram_mb, state.total_usable_ram_mb = host["free_mib"], host["mib"]
        state.vcpus_total, state.vcpus_used = host["cpus"], host["vcpus_used"]
        state.free_disk_mb, state.total_usable_disk_gb = 10**9, 10**6
        state.cpu_allocation_ratio = state.ram_allocation_ratio = state.disk_allocation_ratio = 1.0
        state.num_instances = host["instances"]
        state.instances = dict.fromkeys(host["members"])
        state.stats = {}
        state.hypervisor_version = 9000000
        state.cpu_info = json.dumps(
            {"model": host["model"], "arch": host["arch"], "features": ["aes", "avx"]}
        )
        state.supported_instances = [[host["arch"], "kvm", "hvm"]]
        state.service = host_manager.ReadOnlyDict(
            {
                "disabled": host["disabled"],
                "last_seen_up": now,
                "created_at": now,
                "host": host["name"],
                "binary": "nova-compute",
            }
        )
        state.metrics = objects.MonitorMetricList(
            objects=[
                objects.MonitorMetric(name="cpu.percent", value=host["load"], timestamp=now, source="libvirt")
            ]
        )
        made.append(state)
    return made


def spec(request):
    flavor = objects.Flavor(
        memory_mb=request["mib"], vcpus=request["vcpus"], root_gb=40, ephemeral_gb=0, swap=0,
        extra_specs={"capabilities:cpu_info:model": "s== " + request["model"]},
    )  # fmt: skip
    image = objects.ImageMeta(properties=objects.ImageMetaProps(hw_architecture=request["arch"]))
    group = None
    if request["policy"]:
        group = objects.InstanceGroup(
            uuid="00000000-0000-0000-0000-000000000001", policy=request["policy"], policies=[request["policy"]], rules={},
            members=request["members"], hosts=request["hosts"],
        )  # fmt: skip
    return objects.RequestSpec(
        instance_uuid="00000000-0000-0000-0000-000000000002", flavor=flavor, image=image, instance_group=group,
        numa_topology=None, pci_requests=None, ignore_hosts=None, force_hosts=None, force_nodes=None,
        requested_destination=None, num_instances=1, is_bfv=False, scheduler_hints={}, retry=None, limits=None,
    )  # fmt: skip


def decide(hosts, request, found):
    """(ms, weighed hosts, best first)."""
    began = time.perf_counter()
    passing = hosts.get_filtered_hosts(found, request)
    weighed = hosts.get_weighed_hosts(passing, request)
    return (time.perf_counter() - began) * 1000, weighed


def main():
    world = json.loads(sys.stdin.readline())
    configure(world)
    objects.register_all()
    found = states(world)
    five, every = manager(WEIGHERS), manager(ALL_WEIGHERS)
    print(json.dumps({"ready": len(found)}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        request = spec(asked)
        ms, weighed = decide(five, request, found)
        default_ms, _ = decide(every, request, found) if asked["default"] else (0.0, None)
        worth = {each.obj.host: each.weight for each in weighed}
        best = weighed[0] if weighed else None
        answer = {
            "ms": ms, "default_ms": default_ms, "passing": len(weighed), "best": best.obj.host if best else "",
            "weight": best.weight if best else None, "chosen_weight": worth.get(asked["chosen"]),
        }  # fmt: skip
        print(json.dumps(answer), flush=True)


main()
