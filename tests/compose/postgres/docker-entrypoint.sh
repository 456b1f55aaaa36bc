#!/bin/bash
# Like the official image: as root it gives the directories to postgres and becomes it; an empty data directory gets a
# cluster whose superuser has the password in POSTGRES_PASSWORD_FILE. Without the file it ends, as that one does.
set -eu
PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
if [ "$(id -u)" = 0 ]; then
  mkdir -p "$PGDATA"
  chown -R postgres:postgres "$PGDATA" /var/run/postgresql
  chmod 700 "$PGDATA"
  chmod 3777 /var/run/postgresql
  exec setpriv --reuid=postgres --regid=postgres --init-groups "$0" "$@"
fi
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  password=$(< "$POSTGRES_PASSWORD_FILE")
  # shellcheck disable=SC2086  # several arguments
  initdb --username=postgres --pwfile=<(printf '%s\n' "$password") ${POSTGRES_INITDB_ARGS:-}
fi
exec "$@"
