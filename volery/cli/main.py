"""The `volery` command."""

from __future__ import annotations

import typer

from volery.cli import (
    access,
    admin,
    affinity,
    cpus,
    estate,
    fencing,
    host_devices,
    placing,
    plans,
    policies,
    power_saving,
    protection,
    soft_fencing,
    storage,
    streams,
    vm,
)

app = typer.Typer(
    help="Volery: KVM hosts and their virtual machines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
NOUNS: dict[str, typer.Typer] = {
    "vm": vm.app,
    "host": estate.hosts,
    "cluster": estate.clusters,
    "data-center": estate.data_centers,
    "storage-domain": storage.domains,
    "disk": storage.disks,
    "network": estate.networks,
    "mac-pool": estate.mac_pools,
    "operation": streams.operations,
    "claim": admin.claims,
    "decision": placing.app,
    "liveness": admin.liveness,
    "user": access.users,
    "token": access.tokens,
    "fencing": fencing.fencing,
    "fence": fencing.records,
    "protection": protection.app,
    "start-group": protection.groups,
    "affinity-group": affinity.app,
    "scheduling-policy": policies.app,
    "plan": plans.app,
    "event-reader": access.readers,
    "admin": admin.app,
}
for _name, _noun in NOUNS.items():
    app.add_typer(_noun, name=_name)
estate.clusters.add_typer(fencing.policies, name="fencing-policy")
estate.clusters.command("balance")(plans.balance)
estate.clusters.command("upgrade")(plans.upgrade)
estate.hosts.add_typer(fencing.power_management, name="power-management")
estate.hosts.add_typer(soft_fencing.app, name="soft-fencing")
estate.hosts.command()(fencing.power)
estate.hosts.command("save-power")(power_saving.save_power)
estate.hosts.command()(power_saving.wake)
estate.hosts.command()(placing.capacity)
estate.hosts.command()(host_devices.devices)
estate.hosts.command()(fencing.evidence)
estate.hosts.command("confirm-rebooted")(fencing.confirm_rebooted)
app.command()(access.login)
app.command()(access.logout)
app.command()(streams.events)
app.command()(streams.console)
app.command("explain")(placing.explain)
app.command("licence-report")(cpus.licence_report)


def main() -> None:
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
