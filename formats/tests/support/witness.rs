//! A second opinion on QCOW2 images, written from the specification and sharing no code with what it judges: what a sector holds, and
//! what is wrong with refcounts. For small images in memory; panics where the image contradicts itself.

#[derive(Clone, Debug)]
pub struct Witness<'a> {
    bytes: &'a [u8],
    cluster: u64,
    extended: bool,
    order: u32,
    pub dirty: bool,
    pub corrupt_bit: bool,
    version: u32,
    size: u64,
}

/// What a sector is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    Value(u64),
    Torn,
    Parent,
}

impl<'a> Witness<'a> {
    pub fn new(bytes: &'a [u8]) -> Witness<'a> {
        let mut one = Witness {
            bytes,
            cluster: 512,
            extended: false,
            order: 4,
            dirty: false,
            corrupt_bit: false,
            version: 0,
            size: 0,
        };
        assert_eq!(one.u32(0), 0x5146_49fb, "no image");
        one.version = one.u32(4);
        one.cluster = 1 << one.u32(20);
        one.size = one.u64(24);
        if one.version == 3 {
            let features = one.u64(72);
            one.dirty = features & 1 != 0;
            one.corrupt_bit = features & 2 != 0;
            one.extended = features & 16 != 0;
            one.order = one.u32(96);
        }
        one
    }

    fn u32(&self, at: u64) -> u32 {
        (self.u64(at) >> 32) as u32
    }

    /// Eight bytes; zeroes behind the end.
    fn u64(&self, at: u64) -> u64 {
        let mut out = [0; 8];
        for (n, byte) in out.iter_mut().enumerate() {
            *byte = self.bytes.get(at as usize + n).copied().unwrap_or(0);
        }
        u64::from_be_bytes(out)
    }

    fn step(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    fn l2(&self, guest: u64) -> Option<u64> {
        let per_table = self.cluster / self.step();
        let number = guest / self.cluster;
        let l1 = self.u64(40) + number / per_table * 8;
        let table = self.u64(l1) & 0x00ff_ffff_ffff_fe00;
        (table != 0).then(|| table + number % per_table * self.step())
    }

    pub fn sector(&self, sector: u64) -> Found {
        let guest = sector * 512;
        let Some(at) = self.l2(guest) else { return Found::Parent };
        let (entry, bitmap) = (self.u64(at), if self.extended { self.u64(at + 8) } else { 0 });
        let host = entry & 0x00ff_ffff_ffff_fe00;
        let within = guest % self.cluster;
        let (data, zero) = if self.extended {
            let bit = within / (self.cluster / 32);
            (bitmap >> bit & 1 == 1, bitmap >> (bit + 32) & 1 == 1)
        } else {
            (host != 0 && entry & 1 == 0, entry & 1 == 1)
        };
        assert!(!data || !zero && host != 0, "entry {entry:x} {bitmap:x}");
        if zero {
            return Found::Value(0);
        }
        if !data {
            return Found::Parent;
        }
        let from = (host + within) as usize;
        assert!(from + 512 <= self.bytes.len(), "data behind the end");
        super::oracle::value_of(&self.bytes[from..from + 512]).map_or(Found::Torn, Found::Value)
    }

    fn refcount(&self, cluster: u64) -> u64 {
        let bits = 1_u64 << self.order;
        let per_block = self.cluster * 8 / bits;
        let table = self.u64(48);
        let length = u64::from(self.u32(56)) * self.cluster / 8;
        if cluster / per_block >= length {
            return 0;
        }
        let block = self.u64(table + cluster / per_block * 8);
        if block == 0 {
            return 0;
        }
        let bit = cluster % per_block * bits;
        if bits >= 8 {
            return self.u64(block + bit / 8) >> (64 - bits);
        }
        let byte = self.u64(block + bit / 8) >> 56;
        byte >> (bit % 8) & ((1 << bits) - 1)
    }

    /// Leaked clusters. Panics on whatever is worse.
    pub fn leaks(&self) -> u64 {
        let clusters = (self.bytes.len() as u64).div_ceil(self.cluster);
        let mut named = vec![0_u64; clusters as usize];
        let mut name = |at: u64, bytes: u64, what: &str| {
            assert!(at.is_multiple_of(self.cluster), "{what} at {at} is not aligned");
            for cluster in at / self.cluster..(at + bytes).div_ceil(self.cluster) {
                assert!(cluster < clusters, "{what} behind the end");
                named[cluster as usize] += 1;
                assert!(named[cluster as usize] == 1, "cluster {cluster} named twice, as {what}");
            }
        };
        name(0, self.cluster, "header");
        let table = self.u64(48);
        let length = u64::from(self.u32(56)) * self.cluster;
        name(table, length, "refcount table");
        for at in (table..table + length).step_by(8) {
            if self.u64(at) != 0 {
                name(self.u64(at), self.cluster, "refcount block");
            }
        }
        let (l1, entries) = (self.u64(40), u64::from(self.u32(36)));
        name(l1, entries * 8, "L1 table");
        let mut only = Vec::new();
        for at in (l1..l1 + entries * 8).step_by(8) {
            let l2 = self.u64(at) & 0x00ff_ffff_ffff_fe00;
            if l2 == 0 {
                continue;
            }
            name(l2, self.cluster, "L2 table");
            only.push((self.u64(at) >> 63, l2));
            for at in (l2..l2 + self.cluster).step_by(self.step() as usize) {
                let entry = self.u64(at);
                assert!(entry >> 62 & 1 == 0, "compressed");
                let host = entry & 0x00ff_ffff_ffff_fe00;
                if host != 0 {
                    name(host, self.cluster, "data");
                    only.push((entry >> 63, host));
                }
            }
        }
        for (mark, host) in only {
            assert_eq!(mark, 1, "{host}: not marked as the only one");
        }
        let mut leaks = 0;
        for cluster in 0..clusters {
            let (named, counted) = (named[cluster as usize], self.refcount(cluster));
            assert!(counted >= named, "cluster {cluster} is named {named} times and counted {counted}");
            leaks += u64::from(counted > named);
        }
        for cluster in clusters..clusters + 64 {
            assert_eq!(self.refcount(cluster), 0, "cluster {cluster} behind the end is counted");
        }
        leaks
    }
}
