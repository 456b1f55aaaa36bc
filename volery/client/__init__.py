"""Python SDK: typed requests over REST, and two transports that send them, `Client` and `AsyncClient`.

from volery.client.transport import Client
from volery.client import api

with Client.from_session() as volery:
    vm = volery.find(api.VMS, "web1")
    volery.wait(volery.send(api.VMS.act(vm.id, "start")))
"""
