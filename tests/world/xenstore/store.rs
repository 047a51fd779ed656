//! The tree of nodes, and what a domain may do with it, inside a transaction or outside.

use std::collections::BTreeMap;
use std::sync::Arc;

use ::xenstore::{Access, ErrorCode, Path, Permission};

use super::{Domain, Quotas};

/// Bytes that the real server counts for a node besides its permissions, value and children.
const NODE_HEADER_BYTES: usize = 24;

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its value.
    pub value: Vec<u8>,
    /// Its permissions; the first entry names the owner.
    pub permissions: Vec<Permission>,
    /// Names of its children, oldest first.
    pub children: Vec<String>,
    /// Grows with every change of the node.
    pub generation: u64,
}

impl Node {
    /// The domain that owns it.
    pub fn owner(&self) -> Domain {
        self.permissions.first().map_or(0, |first| first.domain)
    }

    /// What a domain may do with it: (read, write).
    fn allows(&self, domain: Domain) -> (bool, bool) {
        if domain == 0 || self.owner() == domain {
            return (true, true);
        }
        let own = self.permissions.iter().skip(1).find(|entry| entry.domain == domain);
        let access = own.or(self.permissions.first()).map_or(Access::None, |entry| entry.access);
        (access.reads(), access.writes())
    }

    fn bytes(&self) -> usize {
        let names: usize = self.children.iter().map(|name| name.len() + 1).sum();
        NODE_HEADER_BYTES + self.permissions.len() * 8 + self.value.len() + names
    }
}

/// All nodes. Cheap to copy, as a transaction does.
#[derive(Clone, Debug)]
pub struct Store {
    nodes: BTreeMap<String, Arc<Node>>,
    generation: u64,
}

impl Store {
    pub(super) fn new() -> Store {
        let mut store = Store { nodes: BTreeMap::new(), generation: 0 };
        for (path, child) in [("/", "tool"), ("/tool", "xenstored"), ("/tool/xenstored", "")] {
            let permissions = vec![Permission { domain: 0, access: Access::None }];
            let children =
                Some(child).filter(|name| !name.is_empty()).map(str::to_owned).into_iter().collect();
            store.put(path, Node { value: Vec::new(), permissions, children, generation: 0 });
        }
        store
    }

    /// Looks at a node, whoever may read it.
    pub fn node(&self, path: &str) -> Option<&Node> {
        self.nodes.get(path).map(Arc::as_ref)
    }

    /// All nodes in the order of their paths.
    pub fn nodes(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_str(), node.as_ref()))
    }

    fn put(&mut self, path: &str, mut node: Node) {
        self.generation += 1;
        node.generation = self.generation;
        self.nodes.insert(path.to_owned(), Arc::new(node));
    }

    fn generation_of(&self, path: &str) -> u64 {
        self.node(path).map_or(0, |node| node.generation)
    }

    pub fn owned_by(&self, domain: Domain) -> usize {
        self.nodes.values().filter(|node| node.owner() == domain).count()
    }

    pub(super) fn forget_domain(&mut self, domain: Domain) {
        let owned: Vec<String> = self
            .nodes()
            .filter(|(_, node)| node.owner() == domain)
            .map(|(path, _)| path.to_owned())
            .collect();
        for path in owned {
            self.cut(&path);
        }
        let mentioned: Vec<String> = self
            .nodes()
            .filter(|(_, node)| node.permissions.iter().any(|entry| entry.domain == domain))
            .map(|(path, _)| path.to_owned())
            .collect();
        for path in mentioned {
            let Some(mut node) = self.node(&path).cloned() else { continue };
            node.permissions.retain(|entry| entry.domain != domain);
            self.put(&path, node);
        }
    }

    /// Takes a node and all below out of the tree; the paths taken out, deepest first.
    fn cut(&mut self, path: &str) -> Vec<String> {
        let below = format!("{path}/");
        let mut gone: Vec<String> =
            self.nodes.keys().filter(|p| *p == path || p.starts_with(&below)).cloned().collect();
        gone.reverse();
        for path in &gone {
            self.nodes.remove(path);
        }
        if let (Some((parent, name)), false) = (split(path), gone.is_empty())
            && let Some(mut node) = self.node(parent).cloned()
        {
            node.children.retain(|child| child != name);
            self.put(parent, node);
        }
        gone
    }
}

/// What one transaction did: a store of its own, and everything it depends on or has changed.
#[derive(Debug)]
pub(super) struct Transaction {
    pub(super) store: Store,
    pub(super) log: Log,
    pub(super) events: Vec<Change>,
    /// Set by an error half-way through a change: the real server refuses to commit then.
    pub(super) spoilt: bool,
}

/// The nodes that a transaction touched.
#[derive(Debug, Default)]
pub(super) struct Log {
    /// Each with the generation that it had when first touched; 0 for one that did not exist.
    accessed: BTreeMap<String, u64>,
    changed: Vec<String>,
}

impl Transaction {
    pub(super) fn new(live: &Store) -> Transaction {
        Transaction { store: live.clone(), log: Log::default(), events: Vec::new(), spoilt: false }
    }

    /// Whether anything that it touched is no longer as it was.
    pub(super) fn clashes(&self, live: &Store) -> bool {
        self.log.accessed.iter().any(|(path, generation)| live.generation_of(path) != *generation)
    }

    /// Puts what it changed into the live store.
    pub(super) fn apply(&self, live: &mut Store) {
        for path in &self.log.changed {
            match self.store.node(path) {
                Some(node) => live.put(path, node.clone()),
                None => {
                    live.nodes.remove(path);
                }
            }
        }
    }
}

/// Something that watches may fire for.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) path: String,
    /// Only for watches on exactly this node: it went away because something above it did.
    pub(super) exact: bool,
    /// Who may hear of it: those who may read the node or its parent, before or after the change. `None`: everybody
    /// that the rule in force at the time of firing allows.
    pub(super) readers: Vec<Arc<Node>>,
}

/// A store as one domain sees it.
pub(super) struct View<'a> {
    pub(super) store: &'a mut Store,
    pub(super) domain: Domain,
    pub(super) quotas: Quotas,
    /// Inside a transaction: where to note what was touched.
    pub(super) log: Option<&'a mut Log>,
    pub(super) events: Vec<Change>,
}

impl View<'_> {
    /// The node, if there is one and the domain may read it (or write it, if that is asked). A domain that may not even
    /// read the parent is not told whether the node exists.
    pub(super) fn node_for(&mut self, path: &str, write: bool) -> Result<Arc<Node>, ErrorCode> {
        if path.starts_with('@') || Path::parse(path).is_err() {
            return Err(ErrorCode::Invalid);
        }
        let allowed = |node: &Node, domain| {
            let (reads, writes) = node.allows(domain);
            if write { writes } else { reads }
        };
        let error = match self.look(path) {
            Some(node) if allowed(&node, self.domain) => return Ok(node),
            Some(_) => ErrorCode::Denied,
            None => ErrorCode::Missing,
        };
        let mut above = path;
        while let Some((parent, _)) = split(above) {
            if let Some(node) = self.look(parent) {
                return Err(if allowed(&node, self.domain) { error } else { ErrorCode::Denied });
            }
            above = parent;
        }
        Err(error)
    }

    pub(super) fn write(&mut self, path: &str, value: &[u8]) -> Result<(), ErrorCode> {
        match self.node_for(path, true) {
            Ok(node) => {
                let node = Node { value: value.to_vec(), ..node.as_ref().clone() };
                self.check_size(&node)?;
                self.change(path, node);
            }
            Err(ErrorCode::Missing) => self.create(path, value)?,
            Err(code) => return Err(code),
        }
        self.happened(path, false);
        Ok(())
    }

    pub(super) fn mkdir(&mut self, path: &str) -> Result<(), ErrorCode> {
        match self.node_for(path, true) {
            Ok(_) => Ok(()),
            Err(ErrorCode::Missing) => {
                self.create(path, b"")?;
                self.happened(path, false);
                Ok(())
            }
            Err(code) => Err(code),
        }
    }

    pub(super) fn remove(&mut self, path: &str) -> Result<(), ErrorCode> {
        match self.node_for(path, true) {
            Ok(_) if path == "/" => return Err(ErrorCode::Invalid),
            Ok(_) => {}
            Err(ErrorCode::Missing) => {
                let parent = split(path).and_then(|(parent, _)| self.look(parent));
                return parent.map(|_| ()).ok_or(ErrorCode::Missing);
            }
            Err(code) => return Err(code),
        }
        self.happened(path, false);
        let below = format!("{path}/");
        let gone: Vec<String> =
            self.store.nodes.keys().filter(|p| *p == path || p.starts_with(&below)).rev().cloned().collect();
        for node in &gone {
            self.happened(node, true);
            self.touch(node, true);
        }
        if let Some((parent, _)) = split(path) {
            self.touch(parent, true);
        }
        self.store.cut(path);
        Ok(())
    }

    pub(super) fn set_permissions(&mut self, path: &str, list: &[Permission]) -> Result<(), ErrorCode> {
        if list.is_empty() {
            return Err(ErrorCode::Invalid);
        }
        if self.domain != 0 && list.len() > self.quotas.permissions {
            return Err(ErrorCode::NoSpace);
        }
        let node = self.node_for(path, true)?;
        if self.domain != 0 && node.owner() != self.domain {
            return Err(ErrorCode::Denied);
        }
        if self.domain != 0 && list[0].domain != node.owner() {
            return Err(ErrorCode::NotOwner);
        }
        self.happened(path, false);
        let changed = Node { permissions: list.to_vec(), ..node.as_ref().clone() };
        self.check_size(&changed)?;
        self.change(path, changed);
        self.happened(path, false);
        let merged: Vec<Arc<Node>> = self
            .events
            .split_off(self.events.len() - 2)
            .into_iter()
            .flat_map(|event| event.readers)
            .collect();
        self.events.push(Change { path: path.to_owned(), exact: false, readers: merged });
        Ok(())
    }

    /// Makes a node and the parents that are missing. They inherit the permissions of the nearest one that is there;
    /// what a domain other than 0 makes, it owns.
    fn create(&mut self, path: &str, value: &[u8]) -> Result<(), ErrorCode> {
        let mut missing = vec![path.to_owned()];
        let mut above = path;
        let mut base = loop {
            let Some((parent, _)) = split(above) else { return Err(ErrorCode::Missing) };
            if let Some(node) = self.look(parent) {
                break node.as_ref().clone();
            }
            missing.push(parent.to_owned());
            above = parent;
        };
        if self.domain != 0 && self.store.owned_by(self.domain) + missing.len() > self.quotas.nodes {
            return Err(ErrorCode::NoSpace);
        }
        let mut permissions = base.permissions.clone();
        if let (true, Some(first)) = (self.domain != 0, permissions.first_mut()) {
            first.domain = self.domain;
        }
        let mut made = Vec::new();
        for (index, path) in missing.iter().enumerate().rev() {
            let Some((parent, name)) = split(path) else { return Err(ErrorCode::Invalid) };
            base.children.push(name.to_owned());
            self.check_size(&base)?;
            made.push((parent.to_owned(), base));
            let value = if index == 0 { value.to_vec() } else { Vec::new() };
            base = Node { value, permissions: permissions.clone(), children: Vec::new(), generation: 0 };
        }
        self.check_size(&base)?;
        made.push((path.to_owned(), base));
        for (path, node) in made {
            self.change(&path, node);
        }
        Ok(())
    }

    fn check_size(&self, node: &Node) -> Result<(), ErrorCode> {
        let fits = self.domain == 0 || node.bytes() < self.quotas.node_bytes;
        if fits { Ok(()) } else { Err(ErrorCode::NoSpace) }
    }

    fn look(&mut self, path: &str) -> Option<Arc<Node>> {
        self.touch(path, false);
        self.store.nodes.get(path).cloned()
    }

    fn change(&mut self, path: &str, node: Node) {
        self.touch(path, true);
        self.store.put(path, node);
    }

    fn touch(&mut self, path: &str, changes: bool) {
        let Some(log) = self.log.as_mut() else { return };
        if !log.accessed.contains_key(path) {
            log.accessed.insert(path.to_owned(), self.store.generation_of(path));
        }
        if changes && !log.changed.iter().any(|changed| changed == path) {
            log.changed.push(path.to_owned());
        }
    }

    fn happened(&mut self, path: &str, exact: bool) {
        let parent = split(path).map(|(parent, _)| parent);
        let readers = [Some(path), parent].into_iter().flatten();
        let readers = readers.filter_map(|path| self.store.nodes.get(path).cloned()).collect();
        self.events.push(Change { path: path.to_owned(), exact, readers });
    }
}

impl Change {
    pub(super) fn may_be_heard_by(&self, domain: Domain) -> bool {
        domain == 0 || self.readers.iter().any(|node| node.allows(domain).0)
    }
}

/// A path's parent and its last name; `None` for the root.
fn split(path: &str) -> Option<(&str, &str)> {
    match path.rsplit_once('/')? {
        (_, "") => None,
        ("", name) => Some(("/", name)),
        (parent, name) => Some((parent, name)),
    }
}
