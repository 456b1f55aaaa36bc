#!/bin/sh
# Starts a container's program once set-up has put its identity into /run/volery, if it gets one there.
#
# Compose's own conditions say the same, but not every program that reads docker-compose.yml knows them.
set -eu

if [ -d /run/volery ]; then
  waited=0
  until [ -e /run/volery/complete ]; do
    [ $((waited % 50)) -ne 0 ] || echo "waiting for the container 'setup' to write this one's identity to /run/volery"
    waited=$((waited + 1))
    sleep 0.2
  done
fi
exec "$@"
