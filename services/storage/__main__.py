"""`python -m services.storage`"""

from services.storage.service import service
from volery.runtime.programs import run

run(service)
