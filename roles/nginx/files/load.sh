# shellcheck shell=sh
# load.sh KEPT FILES: makes nginx run what its files say, and prints "loaded"; nothing where it runs that already. Where nginx
# cannot, it runs what it ran before, and the exit status is 1. KEPT holds a copy of what was loaded last, so that a run
# which ended too early loses nothing; FILES, below it, is the folder of certificates that stays.
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
    # The master has taken a configuration when it has a new worker; one that it cannot use is a line in the log only.
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
