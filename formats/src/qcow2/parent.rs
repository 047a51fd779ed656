//! Changes of what follows the header in cluster 0: the parent's name and format, and XCP-ng's hidden flag.

use alloc::vec::Vec;

use crate::bytes::{index, narrow, put, wide};
use crate::error::Unsupported;
use crate::medium::Medium;
use crate::qcow2::header::{
    CORRUPT, DIRTY, EXT_BACKING_FORMAT, EXT_FEATURE_NAMES, Extension, Header, refuse_name,
};

/// XCP-ng's storage manager keeps 8 bytes here, the first of which says that the image only serves as a parent.
const EXT_HIDDEN: u32 = 0x7661_7465;

/// Whether XCP-ng's storage manager hides the image.
#[must_use]
pub fn hidden(header: &Header) -> bool {
    let mut flags = header.extensions.iter().filter(|extension| extension.kind == EXT_HIDDEN);
    flags.any(|extension| extension.data.first().is_some_and(|flag| *flag != 0))
}

/// Hides an image, or shows it again.
///
/// # Errors
/// [`Unsupported::Refused`] where there is no room, and what the medium says.
pub fn set_hidden(medium: &mut dyn Medium, hidden: bool) -> Result<(), Unsupported> {
    let header = Header::read(medium)?;
    let mut extensions = header.extensions.clone();
    let flag = extensions.iter_mut().find(|extension| extension.kind == EXT_HIDDEN);
    match flag {
        Some(extension) => put(&mut extension.data, 0, &[u8::from(hidden)]),
        None if hidden => {
            extensions.push(Extension { kind: EXT_HIDDEN, data: [1, 0, 0, 0, 0, 0, 0, 0].into() })
        }
        None => return Ok(()),
    }
    let name = header.backing.as_ref().map_or("", |backing| &backing.name);
    rewrite(medium, &header, &extensions, name)
}

/// Gives an image another parent by name and format, or none. No data are looked at: what the image does not hold itself must be
/// the same in the new parent.
///
/// # Errors
/// [`Unsupported::Refused`] for a name that cannot be, an image that must be repaired first, or a header without room; and what the
/// medium says.
pub fn set_backing(medium: &mut dyn Medium, backing: Option<(&str, &str)>) -> Result<(), Unsupported> {
    let header = Header::read(medium)?;
    if header.incompatible & (DIRTY | CORRUPT) != 0 {
        return Err(Unsupported::Refused("it was not closed, or is marked as corrupt: repair it first"));
    }
    let (name, format) = backing.unwrap_or_default();
    if name.len() > 1023 || name.contains('\0') || (backing.is_some() && name.is_empty()) {
        return Err(Unsupported::Refused("a parent's name has 1 to 1023 bytes, none of them zero"));
    }
    refuse_name(name)?;
    let mut extensions = header.extensions.clone();
    let place = extensions.iter().position(|extension| extension.kind == EXT_BACKING_FORMAT);
    match (place, backing) {
        (Some(place), None) => drop(extensions.remove(place)),
        (None, None) => {}
        (place, Some(_)) => {
            let data = Vec::from(format.as_bytes());
            let extension = Extension { kind: EXT_BACKING_FORMAT, data };
            match place.and_then(|place| extensions.get_mut(place)) {
                Some(old) => *old = extension,
                None => extensions.push(extension),
            }
        }
    }
    rewrite(medium, &header, &extensions, name)
}

/// Writes cluster 0 anew with other extensions and another name: first what the header as it is does not need, then, when that is
/// durable, its first sector. Where old and new share more than that sector, all in one write.
fn rewrite(
    medium: &mut dyn Medium,
    header: &Header,
    extensions: &[Extension],
    name: &str,
) -> Result<(), Unsupported> {
    let mut old = alloc::vec![0; index(header.shape.cluster_bytes())];
    medium.read(0, &mut old)?;
    let known: Vec<&Extension> = extensions.iter().collect();
    let short: Vec<&Extension> =
        extensions.iter().filter(|extension| extension.kind != EXT_FEATURE_NAMES).collect();
    let mut fallback = None;
    for list in [&known, &short] {
        for behind_old in [true, false] {
            let Some(new) = lay_out(&old, header, list, name, behind_old) else { continue };
            let mut between = new.clone();
            between.get_mut(..512).unwrap_or_default().copy_from_slice(old.get(..512).unwrap_or_default());
            if Header::parse(&between).as_ref() == Ok(header) {
                write_changes(medium, &old, &between)?;
                medium.sync()?;
                medium.write(0, new.get(..512).unwrap_or_default())?;
                medium.sync()?;
                return Ok(());
            }
            fallback = fallback.or(Some(new));
        }
    }
    let Some(new) = fallback else {
        return Err(Unsupported::Refused("there is no room for it in the first cluster of the image"));
    };
    write_changes(medium, &old, &new)?;
    medium.sync()?;
    Ok(())
}

/// Cluster 0 with other extensions and name; the name behind the old one, or as far in front as it can be.
fn lay_out(
    old: &[u8],
    header: &Header,
    extensions: &[&Extension],
    name: &str,
    behind_old: bool,
) -> Option<Vec<u8>> {
    let mut new = Vec::from(old);
    let mut at = header.header_bytes as usize;
    for Extension { kind, data } in extensions {
        let end = at + 8 + data.len().next_multiple_of(8);
        let place = new.get_mut(at..end)?;
        place.fill(0);
        put(place, 0, &kind.to_be_bytes());
        put(place, 4, &narrow(wide(data.len())).to_be_bytes());
        put(place, 8, data);
        at = end;
    }
    new.get_mut(at..at + 8)?.fill(0);
    at += 8;
    if behind_old {
        let old_name = crate::bytes::be64(old, 8);
        at = at.max(index(old_name + u64::from(crate::bytes::be32(old, 16))).next_multiple_of(8));
    }
    new.get_mut(at..at + name.len())?.copy_from_slice(name.as_bytes());
    let offset = if name.is_empty() { 0 } else { wide(at) };
    put(&mut new, 8, &offset.to_be_bytes());
    put(&mut new, 16, &narrow(wide(name.len())).to_be_bytes());
    Some(new)
}

/// Writes the sectors that differ, from the first to the last of them.
fn write_changes(medium: &mut dyn Medium, old: &[u8], new: &[u8]) -> Result<(), Unsupported> {
    let differs = |at: &usize| old.get(*at..at + 512) != new.get(*at..at + 512);
    let first = (0..new.len()).step_by(512).find(differs);
    let last = (0..new.len()).step_by(512).rfind(differs);
    if let (Some(first), Some(last)) = (first, last) {
        medium.write(wide(first), new.get(first..last + 512).unwrap_or_default())?;
    }
    Ok(())
}
