#!/bin/sh
# Installs what some tests drive and pip can't bring: Chromium, for the dashboard, from Debian's or Ubuntu's packages.
# Needs root. Elsewhere it says so and succeeds: those tests are then skipped, unless CI=true, which makes them fail.
set -eu

missing=""
command -v chromium >/dev/null 2>&1 || missing="$missing chromium"
# Prometheus is not installed: its test unpacks the package into a folder of its own, for which the lists must be there.
if [ -z "$missing" ] && apt-cache show prometheus >/dev/null 2>&1; then
  exit 0
fi
if ! command -v apt-get >/dev/null 2>&1 || [ "$(id -u)" -ne 0 ]; then
  echo "not installed, since that needs apt-get and root:${missing:- package lists}; tests that drive it are skipped" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
if [ -n "$missing" ]; then
  # shellcheck disable=SC2086  # one word for each package
  apt-get -qq install --yes --no-install-recommends $missing >/dev/null
fi
