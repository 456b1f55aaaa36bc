"""`python -m services.storage`"""

from services.storage.service import service
from volery.runtime.service import run

run(service)
