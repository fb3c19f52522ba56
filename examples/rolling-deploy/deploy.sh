#!/bin/sh
# Restarts every backend of a service, one after the other, without failing a request.
#
# Usage: deploy.sh SERVICE COMMAND [ARGUMENT...]
#
# COMMAND is run for each backend with its name behind the arguments, and has to return when the
# backend was told to restart; whether it serves again is for the health checks to say.
set -eu

if test $# -lt 2; then
    echo "usage: $0 SERVICE COMMAND [ARGUMENT...]" >&2
    exit 2
fi
sluice=${SLUICE:-sluice}
service=$1
shift

for backend in $("$sluice" backend list "$service" | awk 'NR > 1 { print $2 }'); do
    # No new flows; those it has may end.
    "$sluice" backend drain "$service" "$backend" --wait --timeout "${DRAIN:-5m}"
    # What the checks found before the restart counts for nothing after it.
    "$sluice" backend maint "$service" "$backend"
    "$@" "$backend"
    # Its first good check brings it back.
    "$sluice" backend ready "$service" "$backend" --wait --timeout "${START:-2m}"
done
