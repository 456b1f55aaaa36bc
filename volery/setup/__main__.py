"""`python -m volery.setup up|down|clean|status`: what the Makefile calls."""

from __future__ import annotations

import argparse
import os
import sys

from volery.runtime.signing import IdentityError
from volery.setup import first_vm
from volery.setup.clean import clean
from volery.setup.console import Output
from volery.setup.down import down
from volery.setup.errors import SetupError
from volery.setup.home import Home
from volery.setup.status import status
from volery.setup.up import up


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m volery.setup", description=__doc__)
    parser.add_argument("verb", choices=["up", "down", "clean", "status"])
    verb = parser.parse_args(arguments).verb
    home, output = Home.from_environment(), Output()
    try:
        if verb == "up":
            first_vm.finish(up(home, output), output)
        elif verb == "down":
            down(home, output)
        elif verb == "clean":
            return 0 if clean(home, output, yes=os.environ.get("YES") == "1") else 1
        else:
            return 0 if status(home, output) else 1
    except (SetupError, IdentityError) as error:
        output.fail(str(error))
        return 1
    except KeyboardInterrupt:
        output.fail("interrupted; run the same command again to go on.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
