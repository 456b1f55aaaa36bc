"""`python -m services.network`"""

from services.network.service import service
from volery.runtime.programs import run

run(service)
