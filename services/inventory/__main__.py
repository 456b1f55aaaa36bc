"""`python -m services.inventory`"""

from services.inventory.service import service
from volery.runtime.service import run

run(service)
