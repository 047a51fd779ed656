# Instructions by domain, space and function, from a list of 16-digit addresses: see image/profile-xen.
# Addresses are compared as text: 64-bit numbers do not fit into awk's.

function load_symbols(file, table,   line, word, n) {
  n = 0
  while ((getline line < file) > 0) {
    split(line, word, " ")
    n++
    raw[n] = substr("0000000000000000" word[1], length(word[1]) + 1) " " name_of(line)
  }
  close(file)
  count[table] = n
  sorted = symbols "/sorted"
  for (i = 1; i <= n; i++) print raw[i] | ("sort >" sorted)
  close("sort >" sorted)
  n = 0
  while ((getline line < sorted) > 0) {
    n++
    address[table, n] = substr(line, 1, 16)
    label[table, n] = substr(line, 18)
    entry[table, label[table, n]] = address[table, n]
  }
  close(sorted)
}

# The name without its address and its type letter; a module's in brackets stays.
function name_of(line) {
  sub(/^[0-9a-f]+ /, "", line)
  sub(/^[a-zA-Z] /, "", line)
  gsub(/\t/, " ", line)
  return line
}

function find(table, pc,   low, high, middle) {
  low = 0
  high = count[table]
  while (low < high) {
    middle = int((low + high + 1) / 2)
    if (address[table, middle] <= pc) low = middle; else high = middle - 1
  }
  return low ? label[table, low] : "?"
}

function hex(text,   value, i) {
  value = 0
  for (i = 1; i <= length(text); i++) value = value * 16 + index("0123456789abcdef", substr(text, i, 1)) - 1
  return value
}

function space(pc) {
  if (pc < "0000800000000000") return "user"
  if (pc >= "ffff820000000000" && pc < "ffff880000000000") return "xen"
  return "kernel"
}

function function_of(domain, pc,   where) {
  where = space(pc)
  if (where == "xen") return find("xen", pc)
  if (where == "kernel") return find((domain == "guest" && pc >= "ffffffffc0000000") ? "guest" : "dom0", pc)
  if (domain == "guest") return "(all)"
  where = hex(pc) - base
  if (where < 0 || where > 67108864) return "(other)"
  return find("vbdd", sprintf("%016x", where))
}

function end_slice(   pc, domain) {
  domain = told_guest > told_dom0 ? "guest" : (told_dom0 ? "dom0" : last)
  for (pc in slice) total[domain, pc] += slice[pc]
  last = domain
  split("", slice)
  told_guest = told_dom0 = 0
}

BEGIN {
  load_symbols(symbols "/dom0", "dom0")
  load_symbols(symbols "/guest", "guest")
  load_symbols(symbols "/xen", "xen")
  load_symbols(symbols "/vbdd", "vbdd")
  base = 0
  if ((getline line < (symbols "/vbdd.maps")) > 0) base = hex(substr(line, 1, index(line, "-") - 1))
  switching = entry["xen", "context_switch"]
  request = entry["dom0", "io_submit_one"]
  if (request == "") request = entry["dom0", "io_submit_one.constprop.0"]
  # What only the one or the other runs.
  for (i = split("io_submit_one io_submit_one.constprop.0 aio_complete_rw read_events aio_read aio_write do_io_getevents", word, " "); i; i--)
    if (("dom0", word[i]) in entry) guests[entry["dom0", word[i]]] = 1
  for (i = split("shmem_file_read_iter shmem_getpage_gfp shmem_get_folio_gfp shmem_write_begin ep_poll do_epoll_wait __x64_sys_ioctl kthread_should_stop xen_irq_lateeoi", word, " "); i; i--)
    if (("dom0", word[i]) in entry) dom0s[entry["dom0", word[i]]] = 1
  last = "dom0"
  # Without do_iret: it is how a PV kernel returns to a program, part of every system call and interrupt.
  for (i = split("grant_table_op event_channel_op sched_op mmu_update mmuext_op update_va_mapping multicall stack_switch set_segment_base fpu_taskswitch vcpu_op set_timer_op physdev_op update_descriptor memory_op", word, " "); i; i--)
    hypercall["do_" word[i]] = 1
}

{
  if ($1 == switching) end_slice()
  slice[$1]++
  if ($1 in guests) told_guest++
  if ($1 in dom0s) told_dom0++
  if ($1 == request) requests++
}

END {
  end_slice()
  if (!requests) { print name ": no request in the window"; exit 1 }
  for (key in total) {
    split(key, part, SUBSEP)
    area = part[1] " " space(part[2])
    areas[area] += total[key]
    called = function_of(part[1], part[2])
    functions[area "|" called] += total[key]
    all += total[key]
    if (area == "dom0 kernel" && called ~ /^__x64_sys_/ && entry["dom0", called] == part[2]) {
      syscalls += total[key]
      syscall_list = syscall_list sprintf(" %s %.3f", substr(called, 11), total[key] / requests)
    }
    if (area == "dom0 xen" && called ~ /^do_/ && (called in hypercall) && entry["xen", called] == part[2]) {
      hypercalls += total[key]
      hypercall_list = hypercall_list sprintf(" %s %.3f", substr(called, 4), total[key] / requests)
    }
  }
  printf "\n%s: %d requests, %d instructions a request\n", name, requests, all / requests
  for (area in areas) printf "%8d  %s\n", areas[area] / requests, area | "sort -rn"
  close("sort -rn")
  printf "  dom0, system calls a request: %.3f (%s)\n", syscalls / requests, substr(syscall_list, 2)
  printf "  dom0, hypercalls a request: %.3f (%s)\n", hypercalls / requests, substr(hypercall_list, 2)
  for (i = split("guest user,guest kernel,guest xen,dom0 xen,dom0 kernel,dom0 user", order, ","); i; i--) {
    area = order[i]
    if (!areas[area]) continue
    printf "  %s, of %d:\n", area, areas[area] / requests
    sorter = "sort -rn | head -" top
    for (key in functions) if (index(key, area "|") == 1) printf "%8d    %s\n", functions[key] / requests, substr(key, length(area) + 2) | sorter
    close(sorter)
  }
}
