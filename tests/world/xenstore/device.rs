//! `/dev/xen/xenbus` between a client and the simulated server, with the kernel's ways.

use ::xenstore::ErrorCode;
use ::xenstore::wire::{DEVICE_PAYLOAD_BYTES_MAX, HEADER_BYTES, Header, MessageType};

use super::{ConnectionId, XenstoreServer};

impl XenstoreServer {
    /// One `write` to the device; `Err` is its errno.
    ///
    /// Takes one message; what follows it in the same write is dropped. Until the message is sent (here: served), its
    /// payload lies in the one buffer of the open file, where the next write overwrites it. WATCH and UNWATCH are done at
    /// once, and a WATCH that the server refuses is an error of the write and has no reply.
    pub fn write_device(&mut self, id: ConnectionId, bytes: &[u8]) -> Result<usize, ErrorCode> {
        let Some(header) = bytes.get(..HEADER_BYTES).and_then(|head| head.try_into().ok()) else {
            return Err(ErrorCode::Invalid);
        };
        let header = Header::from_bytes(header);
        let length = usize::try_from(header.length).unwrap_or(usize::MAX);
        if length > DEVICE_PAYLOAD_BYTES_MAX {
            return Err(ErrorCode::TooBig);
        }
        let payload = bytes.get(HEADER_BYTES..HEADER_BYTES + length).ok_or(ErrorCode::Invalid)?.to_vec();
        let Some(connection) = self.connections.get_mut(&id) else { return Err(ErrorCode::Io) };
        for (_, unsent) in &mut connection.inbox {
            let common = unsent.len().min(payload.len());
            unsent[..common].copy_from_slice(&payload[..common]);
        }
        let before = connection.watches.len();
        match MessageType::from_number(header.kind) {
            Some(kind @ (MessageType::Watch | MessageType::Unwatch)) => {
                self.serve(id, header, &payload);
                let Some(connection) = self.connections.get_mut(&id) else { return Err(ErrorCode::Io) };
                if kind == MessageType::Watch && connection.watches.len() == before {
                    let refusal = connection.outbox.pop_back();
                    let name =
                        refusal.map(|message| message.bytes[HEADER_BYTES..].to_vec()).unwrap_or_default();
                    return Err(ErrorCode::from_payload(&name));
                }
            }
            _ => connection.inbox.push_back((header, payload)),
        }
        Ok(bytes.len())
    }
}
