"""`python -m services.network`"""

from services.network.service import service
from volery.runtime.service import run

run(service)
