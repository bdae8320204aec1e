# shellcheck shell=sh
# load.sh KEPT FILES: makes nginx load its configuration and prints "loaded"; does nothing if nginx runs it already. If nginx
# cannot load it, restores the former configuration and exits with 1. KEPT has a copy of what nginx loaded last, so that an
# interrupted run loses nothing. FILES is the directory of certificates below KEPT that is not removed.
set -u
kept=$1 files=$2
conf=/etc/nginx/nginx.conf
unit=/etc/systemd/system/nginx.service.d/llamaherd.conf
log=/var/log/nginx/error.log

workers() { grep -ls "^PPid:[[:space:]]*$(cat /run/nginx.pid)\$" /proc/[0-9]*/status; }

load() {
    if [ "$verb" = restart ]; then
        systemctl daemon-reload
        systemctl reset-failed nginx
        systemctl restart nginx
        return
    fi
    before=$(workers)
    systemctl reload nginx || return
    # A new worker shows that the master has accepted the configuration. nginx only logs one that it cannot use.
    for _ in $(seq 100); do
        for worker in $(workers); do
            case "$before" in *"$worker"*) ;; *) return 0 ;; esac
        done
        sleep 0.1
    done
    return 1
}

verb=reload
cmp -s "$unit" "$kept/loaded.unit" && systemctl -q is-active nginx || verb=restart
[ "$verb" = restart ] || ! cmp -s "$conf" "$kept/loaded.conf" || exit 0
logged=$(wc -l 2>/dev/null <"$log" || echo 0)
if load 2>/dev/null; then
    cp -p "$conf" "$kept/loaded.conf"
    cp -p "$unit" "$kept/loaded.unit"
    for old in "$kept"/*; do
        case "$old" in "$files" | */loaded.conf | */loaded.unit) ;; *) rm -rf "$old" ;; esac
    done
    echo loaded
    exit 0
fi
{ nginx -t; tail -n "+$((logged + 1))" "$log"; } 2>&1 | grep emerg | grep -v 'still could not bind' | tail -n 1 >&2
cp -p "$kept/loaded.conf" "$conf"
cp -p "$kept/loaded.unit" "$unit" 2>/dev/null || rm -f "$unit"
load 2>/dev/null
exit 1
