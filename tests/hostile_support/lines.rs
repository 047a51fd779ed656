//! The log's lines, kept for each thread: a test sees its own.

use std::cell::RefCell;

use log::{Level, LevelFilter, Log, Metadata, Record};

thread_local! {
    static LINES: RefCell<Vec<(Level, String)>> = const { RefCell::new(Vec::new()) };
}

struct Keeper;

impl Log for Keeper {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        LINES.with_borrow_mut(|lines| lines.push((record.level(), record.args().to_string())));
    }

    fn flush(&self) {}
}

/// Keeps this thread's lines from now on, from none.
pub fn keep() {
    let _ = log::set_logger(&Keeper);
    log::set_max_level(LevelFilter::Info);
    LINES.with_borrow_mut(Vec::clear);
}

/// The lines that were kept and contain `text`; an empty text means all of them.
pub fn kept(text: &str) -> Vec<String> {
    LINES.with_borrow(|lines| {
        lines.iter().filter(|(_, line)| line.contains(text)).map(|(_, line)| line.clone()).collect()
    })
}
