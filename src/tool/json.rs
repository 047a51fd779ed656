//! JSON, as far as it is written here.

use crate::cli::json_string;

/// An object, field by field.
#[derive(Debug)]
pub(super) struct Object(String);

impl Object {
    /// An empty one.
    #[must_use]
    pub(super) fn new() -> Object {
        Object(String::from("{"))
    }

    fn key(&mut self, key: &str) {
        if self.0.len() > 1 {
            self.0.push_str(", ");
        }
        json_string(key, &mut self.0);
        self.0.push_str(": ");
    }

    /// A field whose value is JSON already.
    #[must_use]
    pub(super) fn raw(mut self, key: &str, value: &str) -> Object {
        self.key(key);
        self.0.push_str(value);
        self
    }

    /// A text.
    #[must_use]
    pub(super) fn text(mut self, key: &str, value: &str) -> Object {
        self.key(key);
        json_string(value, &mut self.0);
        self
    }

    /// A number.
    #[must_use]
    pub(super) fn number(self, key: &str, value: u64) -> Object {
        self.raw(key, &value.to_string())
    }

    /// Yes or no.
    #[must_use]
    pub(super) fn flag(self, key: &str, value: bool) -> Object {
        self.raw(key, if value { "true" } else { "false" })
    }

    /// A text, if there is one.
    #[must_use]
    pub(super) fn maybe(self, key: &str, value: Option<&str>) -> Object {
        match value {
            Some(value) => self.text(key, value),
            None => self,
        }
    }

    /// The whole.
    #[must_use]
    pub(super) fn end(mut self) -> String {
        self.0.push('}');
        self.0
    }
}

/// An array of JSON values.
#[must_use]
pub(super) fn array(values: &[String]) -> String {
    format!("[{}]", values.join(", "))
}

/// A text as a JSON string.
#[must_use]
pub(super) fn quoted(text: &str) -> String {
    let mut out = String::new();
    json_string(text, &mut out);
    out
}
