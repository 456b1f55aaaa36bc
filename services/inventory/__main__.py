"""`python -m services.inventory`"""

from services.inventory.service import service
from volery.runtime.programs import run

run(service)
