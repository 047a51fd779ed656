#!/bin/sh
# The storage layer against fio, both on io_uring and O_DIRECT: same file, same depths, in turns A B A B.
# Prints for each point the median and the range of the ratios of paired runs: IOPS, and CPU time per request (user and
# system). Above 1 means that vbdd did more requests, or needed more CPU for each.
#
#   benches/storage.sh [FILE] [ROUNDS] [SECONDS]
#
# FILE is made when it does not exist (1 GiB of random bytes) and is OVERWRITTEN. FIO_ARGS adds to fio's command line.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
file=${1:-$here/target/tmp/bench.img}
rounds=${2:-5}
seconds=${3:-2}
command -v fio >/dev/null || { echo "fio is needed (apt-get install fio)"; exit 1; }
cargo build --quiet --release --manifest-path "$here/Cargo.toml" --example storage_load
load=$here/target/release/examples/storage_load
mkdir -p "$(dirname "$file")"
[ -f "$file" ] || dd if=/dev/urandom of="$file" bs=1M count=1024 status=none
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# "IOPS CPU_NS" of fio. Fields of its terse output, version 3: 8 and 49 are IOPS, 88 and 89 per cent of user and system time.
run_fio() {
    # shellcheck disable=SC2086
    fio --name=x --filename="$file" --ioengine=io_uring --direct=1 --bs=4k --rw="rand$1" --iodepth="$2" \
        --norandommap --randrepeat=0 --time_based --runtime="$seconds" --ramp_time=0.2 \
        --output-format=terse --terse-version=3 ${FIO_ARGS:-} |
        awk -F';' '{ iops = $8 + $49; cpu = $88 + $89; printf "%.0f %.0f\n", iops, cpu * 1e7 / iops }'
}

run_ours() {
    "$load" "$file" "$1" "$2" "$seconds" engine=uring |
        sed -n 's/^iops=\([0-9]*\) cpu_ns=\([0-9]*\) .*/\1 \2/p'
}

# Median, least and most of a column of numbers.
summary() {
    sort -n | awk '{ v[NR] = $1 } END {
        m = NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2
        printf "%6.2f (%.2f-%.2f)", m, v[1], v[NR] }'
}

printf '%-6s %5s | %-20s | %-20s | %s\n' kind depth 'IOPS ratio' 'CPU ratio' 'last: vbdd IOPS ns, fio IOPS ns'
for kind in read write; do
    for depth in 1 32 128; do
        round=0
        : >"$work/iops"; : >"$work/cpu"
        while [ "$round" -lt "$rounds" ]; do
            a=$(run_ours "$kind" "$depth")
            b=$(run_fio "$kind" "$depth")
            echo "$a $b" | awk '{ printf "%.4f\n", $1 / $3 }' >>"$work/iops"
            echo "$a $b" | awk '{ printf "%.4f\n", $2 / $4 }' >>"$work/cpu"
            round=$((round + 1))
        done
        printf '%-6s %5s | %-20s | %-20s | %s, %s\n' "$kind" "$depth" \
            "$(summary <"$work/iops")" "$(summary <"$work/cpu")" "$a" "$b"
    done
done
