#!/bin/bash
# NBD servers against each other: vbdd nbd, qemu-nbd, qemu-storage-daemon. Same machine, same client (fio's nbd engine), same
# images, same run; in every round each server has its turn. Prints a line for every point:
#   POINT | IOPS | against the strongest peer | CPU, us a request | against the strongest peer | peers
# Ratios are of neighbours in the same round, median (least-most); the strongest peer is the one against which the median is worst.
#   nbd.sh VBDD DIRECTORY ROUNDS SECONDS [POINTS]
# CPU is user and system time of the server's process with all its threads, from /proc.
set -euo pipefail
VBDD=$1 DIR=$2 ROUNDS=$3 SECONDS_EACH=$4
NONE="qemu-nbd:io_uring qemu-nbd:native qsd:io_uring qsd:native"
CACHED="qemu-nbd:io_uring qsd:io_uring"
# name|format|image|cache|peers|fio's arguments. An image "new" is made empty for every run, "chain" has 30 layers.
ALL="raw-read-32|raw|full|none|$NONE|--rw=randread --bs=4k --iodepth=32
raw-write-32|raw|full|none|$NONE|--rw=randwrite --bs=4k --iodepth=32
raw-read-1|raw|full|none|$NONE|--rw=randread --bs=4k --iodepth=1
raw-write-1|raw|full|none|$NONE|--rw=randwrite --bs=4k --iodepth=1
raw-read-32-cached|raw|full|writeback|$CACHED|--rw=randread --bs=4k --iodepth=32
raw-read-128k|raw|full|none|$NONE|--rw=read --bs=128k --iodepth=8
raw-write-128k|raw|full|none|$NONE|--rw=write --bs=128k --iodepth=8
qcow2-read-32|qcow2|full|none|$NONE|--rw=randread --bs=4k --iodepth=32
qcow2-write-32|qcow2|full|none|$NONE|--rw=randwrite --bs=4k --iodepth=32
qcow2-read-1|qcow2|full|none|$NONE|--rw=randread --bs=4k --iodepth=1
qcow2-write-1|qcow2|full|none|$NONE|--rw=randwrite --bs=4k --iodepth=1
qcow2-read-32-cached|qcow2|full|writeback|$CACHED|--rw=randread --bs=4k --iodepth=32
qcow2-alloc-32|qcow2|new|none|$NONE|--rw=randwrite --bs=4k --iodepth=32
qcow2-alloc-flush-32|qcow2|new|none|$NONE|--rw=randwrite --bs=4k --iodepth=32 --fsync=1
qcow2-alloc-flush-1|qcow2|new|none|$NONE|--rw=randwrite --bs=4k --iodepth=1 --fsync=1
qcow2-read-128k|qcow2|full|none|$NONE|--rw=read --bs=128k --iodepth=8
qcow2-write-128k|qcow2|full|none|$NONE|--rw=write --bs=128k --iodepth=8
vhd-read-32|vpc|full|none|$NONE|--rw=randread --bs=4k --iodepth=32
vhd-write-32|vpc|full|none|$NONE|--rw=randwrite --bs=4k --iodepth=32
vhd-alloc-32|vpc|new|none|$NONE|--rw=randwrite --bs=4k --iodepth=32
chain-30|qcow2|chain|writeback|self:full|--rw=randread --bs=4k --iodepth=32"
POINTS=${5:-$(cut -d'|' -f1 <<<"$ALL" | xargs)}
WORK=$(mktemp -d)
SERVER=
finish() { [ -z "$SERVER" ] || kill "$SERVER" 2>/dev/null || true; rm -rf "$WORK" "$DIR"/new.*; }
trap finish EXIT

# image FORMAT NAME: its path; made if it is missing.
image() {
  local format=$1 name=$2 path=$DIR/$2.$1 layer
  case $name in
    full)
      [ -f "$DIR/full.raw" ] || dd if=/dev/urandom of="$DIR/full.raw" bs=1M count="${IMAGE_MIB:-1024}" status=none
      [ -f "$path" ] || qemu-img convert -f raw -O "$format" "$DIR/full.raw" "$path" ;;
    new)
      rm -f "$path"
      qemu-img create -q -f "$format" "$path" 64G ;;
    chain)
      # Each of 30 layers has a thirtieth of the clusters of its own.
      if [ ! -f "$path" ]; then
        image qcow2 full >/dev/null
        cp "$DIR/full.qcow2" "$DIR/chain-0.qcow2"
        for ((layer = 1; layer < 30; layer++)); do
          qemu-img create -q -f qcow2 -F qcow2 -b "chain-$((layer - 1)).qcow2" "$DIR/chain-$layer.qcow2"
          for ((at = layer; at < ${IMAGE_MIB:-1024} * 16; at += 30)); do echo "write -q -P $layer $((at * 64))k 64k"; done |
            qemu-io -f qcow2 "$DIR/chain-$layer.qcow2" >/dev/null
        done
        mv "$DIR/chain-29.qcow2" "$path"
      fi ;;
  esac
  echo "$path"
}

# start WHO FORMAT PATH CACHE: serves at $WORK/s.
start() {
  local who=$1 format=$2 path=$3 cache=$4 own=$2 direct=on
  [ "$format" = vpc ] && own=vhd
  [ "$cache" = none ] || direct=off
  rm -f "$WORK/s"
  case $who in
    vbdd | self:*) "$VBDD" nbd "$own:$path" --socket "$WORK/s" --cache "$cache" --log-level warn & ;;
    qemu-nbd:*) qemu-nbd -t -e 64 -k "$WORK/s" -f "$format" --cache="$cache" --aio="${who#*:}" -x '' "$path" & ;;
    qsd:*) qemu-storage-daemon --nbd-server addr.type=unix,addr.path="$WORK/s",max-connections=64 \
      --blockdev "driver=file,node-name=f,filename=$path,aio=${who#*:},cache.direct=$direct" \
      --blockdev "driver=$format,node-name=d,file=f" --export nbd,id=e,node-name=d,name=,writable=on & ;;
  esac
  SERVER=$!
  for _ in $(seq 200); do
    [ -S "$WORK/s" ] && return
    sleep 0.05
  done
  echo "error: $who does not serve $path" >&2
  exit 2
}

ticks() { awk '{ print $14 + $15 }' "/proc/$SERVER/stat"; }

# one WHO FORMAT IMAGE CACHE FIO-ARGUMENTS...: "IOPS CPU-us-a-request".
one() {
  local who=$1 format=$2 name=$3 cache=$4 path before after
  shift 4
  [[ $who == self:* ]] && name=${who#self:}
  path=$(image "$format" "$name")
  start "$who" "$format" "$path" "$cache"
  # What is measured is neither the disk behind the page cache nor the first look at each cluster of a chain.
  if [ "$cache" = writeback ]; then nbdcopy "nbd+unix:///?socket=$WORK/s" null:; fi
  # Of a new image no block is written twice.
  map=(--norandommap)
  [ "$name" != new ] || map=(--random_generator=lfsr)
  before=$(ticks)
  fio --name=x --ioengine=nbd --uri="nbd+unix:///?socket=$WORK/s" --time_based --runtime="$SECONDS_EACH" --randrepeat=0 \
    "${map[@]}" --minimal --terse-version=3 "$@" >"$WORK/fio" 2>"$WORK/fio.err" ||
    { cat "$WORK/fio.err" >&2; exit 2; }
  after=$(ticks)
  kill "$SERVER"
  wait "$SERVER" || true
  SERVER=
  awk -F';' -v ticks=$((after - before)) -v hz="$(getconf CLK_TCK)" '$8 + $49 > 0 {
    printf "%d %.3f\n", $8 + $49, ticks / hz * 1e6 / (($8 + $49) * ($9 + $50) / 1000) }' "$WORK/fio"
}

# "median (least-most)" of the numbers on standard input.
summary() {
  sort -g | awk -v f="$1" '{ v[NR] = $1 } END { m = NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2
    printf f " (" f "-" f ")", m, v[1], v[NR] }'
}

for point in $POINTS; do
  IFS='|' read -r name format image cache peers arguments < <(grep "^$point|" <<<"$ALL")
  : >"$WORK/rounds"
  : >"$WORK/peers"
  for ((round = 0; round < ROUNDS; round++)); do
    # shellcheck disable=SC2086
    read -r iops cpu < <(one vbdd "$format" "$image" "$cache" $arguments)
    echo "$iops $cpu" >>"$WORK/rounds"
    for peer in $peers; do
      # shellcheck disable=SC2086
      read -r peer_iops peer_cpu < <(one "$peer" "$format" "$image" "$cache" $arguments)
      echo "$peer $peer_iops $peer_cpu $iops $cpu" >>"$WORK/peers"
    done
  done
  : >"$WORK/told"
  : >"$WORK/iops"
  : >"$WORK/cpu"
  for peer in $peers; do
    grep "^$peer " "$WORK/peers" >"$WORK/peer"
    awk '$2 > 0 { print $4 / $2 }' "$WORK/peer" | summary %.2f >>"$WORK/iops"
    awk '$3 > 0 { print $5 / $3 }' "$WORK/peer" | summary %.2f >>"$WORK/cpu"
    echo "$peer $(awk '{ print $2 }' "$WORK/peer" | summary %.0f) $(awk '{ print $3 }' "$WORK/peer" | summary %.1f) us" >>"$WORK/told"
    echo >>"$WORK/iops"
    echo >>"$WORK/cpu"
  done
  printf '%s | %s | %s | %s | %s | %s\n' "$name" "$(awk '{ print $1 }' "$WORK/rounds" | summary %.0f)" \
    "$(grep . "$WORK/iops" | sort -g | head -1)" "$(awk '{ print $2 }' "$WORK/rounds" | summary %.1f)" \
    "$(grep . "$WORK/cpu" | sort -g | tail -1)" "$(paste -sd, "$WORK/told")"
done
