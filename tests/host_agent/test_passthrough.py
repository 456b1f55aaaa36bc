"""A real device in a real guest: a machine with an IOMMU gives its network card to a VM of its own, by VFIO."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support import iommu_machine


@pytest.mark.timeout(600)
def test_a_vm_gets_a_network_card_by_vfio_alone_and_the_host_has_it_back_when_the_vm_ended(
    tmp_path: Path,
) -> None:
    program = Path(iommu_machine.__file__).with_name("passthrough_program.py")
    console = iommu_machine.run(program, tmp_path)
    found = re.search(r"SAID (\{.*\})", console)
    assert found, console
    said = json.loads(found[1])
    first, second = said["groups"]
    assert min(first, second) >= 0
    assert first != second
    assert said["in_use"] == ["", "its network interface eth1 has an address"]
    assert said["model"] == "1af4:1041"
    assert said["drivers"] == ["virtio-pci", "vfio-pci", "virtio-pci"]
    assert said["meanwhile"] == ["vfio-pci", ""]
    assert "PCI device 0000:00:04.0 is in use" in said["refused"]
