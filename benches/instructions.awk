# Instructions per request out of two callgrind files, a short run and a long one that makes `requests` requests more:
# what they differ by, summed by function, the ten functions of vbdd that cost most, and sums for the rest.
function name(kind, text,    close_at, number) {
    close_at = index(text, ")")
    number = substr(text, 1, close_at)
    if (length(text) > close_at) known[run, kind, number] = substr(text, close_at + 2)
    return known[run, kind, number]
}
FNR == 1 { run++ }
/^fn=/ { current = name("fn", substr($0, 4)); next }
/^cfn=/ { name("fn", substr($0, 5)); next }
/^calls=/ { called = 1; next }
/^[-+*0-9]/ {
    if (called) { called = 0; next }
    cost[run, current] += $2
    seen[current]
}
END {
    for (f in seen) {
        n = (cost[2, f] - cost[1, f]) / requests
        if (n < 0.5) continue
        if (f ~ /guest::|FrontRing|request_path::Process/) guest += n
        else if (f ~ /memcpy|memmove|memset/) copies += n
        else { own += n; of[f] = n }
    }
    printf "  %7.0f vbdd itself\n", own
    printf "  %7.0f memcpy: the simulated grant copy, and what is moved on the way\n", copies
    printf "  %7.0f the simulated guest\n", guest
    for (place = 0; place < 12; place++) {
        best = ""
        for (f in of) if (best == "" || of[f] > of[best]) best = f
        if (best == "") break
        printf "    %7.0f %s\n", of[best], best
        delete of[best]
    }
}
