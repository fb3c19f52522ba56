//! Reads typed values out of parsed TOML, and knows the place of each in the file.

use super::Error;
use std::{fmt, path::Path};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

/// Longest piece of the operator's text that an error repeats.
const QUOTE_CHARS: usize = 60;

/// The file being read.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) path: &'a Path,
    pub(super) text: &'a str,
}

impl Source<'_> {
    /// The line, counted from 1, that byte `offset` is in.
    pub(super) fn line(self, offset: usize) -> usize {
        let before = &self.text.as_bytes()[..offset.min(self.text.len())];
        let line = 1 + before.iter().filter(|&&byte| byte == b'\n').count();
        // The parser reports what is missing at the end as behind the last line break.
        line.min(self.text.lines().count().max(1))
    }

    /// An error at byte `offset`.
    pub(super) fn error(self, offset: usize, message: impl Into<String>) -> Error {
        Error::at(self.path, self.line(offset), message)
    }
}

impl Source<'_> {
    /// The error for a text that is not TOML at all.
    pub(super) fn malformed(self, error: &toml::de::Error) -> Error {
        let span = error.span().unwrap_or(0..0);
        let offset = span.start;
        let place = match self.text.get(span).map(str::trim) {
            Some(text) if !text.is_empty() => format!(" at {}", quote(text)),
            _ => String::new(),
        };
        let message = error.message();
        // What the parser takes for a number or a date is nearly always an address or a duration.
        let remedy = if [
            "invalid float",
            "invalid integer",
            "invalid date",
            "string values",
        ]
        .iter()
        .any(|start| message.starts_with(start))
        {
            "put the value in quotation marks"
        } else {
            message
        };
        self.error(offset, format!("not valid TOML{place}: {remedy}"))
    }
}

/// A value together with its place in the file.
#[derive(Clone, Debug)]
pub(super) struct At<T> {
    pub(super) value: T,
    pub(super) offset: usize,
}

/// A table of the file, and the object it describes.
pub(super) struct Section<'a> {
    pub(super) source: Source<'a>,
    /// What errors call it; empty for the file as a whole.
    pub(super) object: String,
    /// Its place.
    pub(super) offset: usize,
    table: &'a DeTable<'a>,
}

impl<'a> Section<'a> {
    /// The file as a whole.
    pub(super) fn root(source: Source<'a>, table: &'a DeTable<'a>) -> Self {
        Self {
            source,
            object: String::new(),
            offset: 0,
            table,
        }
    }

    /// An error of this object, placed at byte `offset`.
    pub(super) fn error(&self, offset: usize, message: impl fmt::Display) -> Error {
        let message = if self.object.is_empty() {
            message.to_string()
        } else {
            format!("{}: {message}", self.object)
        };
        self.source.error(offset, message)
    }

    /// Refuses keys that are not in `known`, the first in the file first.
    pub(super) fn only(&self, known: &[&str]) -> Result<(), Error> {
        let unknown = self
            .table
            .keys()
            .filter(|key| !known.contains(&key.get_ref().as_ref()))
            .min_by_key(|key| key.span().start);
        let Some(key) = unknown else { return Ok(()) };
        let name = key.get_ref();
        let remedy = match closest(name, known) {
            Some(close) => format!("did you mean {close}?"),
            None => format!("known here: {}", known.join(", ")),
        };
        let message = format!("unknown key {}; {remedy}", quote(name));
        Err(self.error(key.span().start, message))
    }

    /// The value of `key`, if the file has it.
    pub(super) fn get(&self, key: &'static str) -> Option<Entry<'a, '_>> {
        let value = self.table.get(key)?;
        Some(Entry {
            section: self,
            key,
            offset: value.span().start,
            value: value.get_ref(),
        })
    }

    /// The value of `key`, or an error that says what to write.
    pub(super) fn require(
        &self,
        key: &'static str,
        remedy: impl fmt::Display,
    ) -> Result<Entry<'a, '_>, Error> {
        self.get(key)
            .ok_or_else(|| self.error(self.offset, format!("{key} is missing; {remedy}")))
    }

    /// The table `key`, described as `object`.
    pub(super) fn table(
        &self,
        key: &'static str,
        object: impl Into<String>,
    ) -> Result<Option<Section<'a>>, Error> {
        let Some(entry) = self.get(key) else {
            return Ok(None);
        };
        let table = entry
            .value
            .as_table()
            .ok_or_else(|| entry.wrong_type(&format!("a table; write it [{key}]")))?;
        Ok(Some(Section {
            source: self.source,
            object: object.into(),
            offset: entry.offset,
            table,
        }))
    }

    /// The array of tables `key`; each still carries this section's object.
    pub(super) fn tables(&self, key: &'static str, header: &str) -> Result<Vec<Self>, Error> {
        let Some(entry) = self.get(key) else {
            return Ok(Vec::new());
        };
        let wrong = || entry.wrong_type(&format!("an array of tables; write each as [[{header}]]"));
        let array = entry.value.as_array().ok_or_else(wrong)?;
        array
            .iter()
            .map(|item| {
                Ok(Section {
                    source: self.source,
                    object: self.object.clone(),
                    offset: item.span().start,
                    table: item.get_ref().as_table().ok_or_else(wrong)?,
                })
            })
            .collect()
    }
}

/// One `key = value`.
pub(super) struct Entry<'a, 's> {
    section: &'s Section<'a>,
    key: &'static str,
    value: &'a DeValue<'a>,
    /// The value's place.
    pub(super) offset: usize,
}

impl<'a> Entry<'a, '_> {
    /// An error at this value.
    pub(super) fn error(&self, message: impl fmt::Display) -> Error {
        self.section.error(self.offset, message)
    }

    /// An error about this value: `KEY "VALUE" MESSAGE`.
    pub(super) fn bad(&self, text: &str, message: impl fmt::Display) -> Error {
        self.error(format!("{} {} {message}", self.key, quote(text)))
    }

    /// The value with its place.
    pub(super) fn at<T>(&self, value: T) -> At<T> {
        At {
            value,
            offset: self.offset,
        }
    }

    fn wrong_type(&self, expected: &str) -> Error {
        self.wrong_type_of(self.value, self.offset, expected)
    }

    fn wrong_type_of(&self, value: &DeValue<'_>, offset: usize, expected: &str) -> Error {
        let found = match value {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "an integer",
            DeValue::Float(_) => "a number with a fraction",
            DeValue::Boolean(_) => "a boolean",
            DeValue::Datetime(_) => "a date",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        };
        let message = format!("{} is {found}, but must be {expected}", self.key);
        self.section.error(offset, message)
    }

    /// A string; `example` is shown when it is none.
    pub(super) fn text(&self, example: &str) -> Result<&'a str, Error> {
        self.value
            .as_str()
            .ok_or_else(|| self.wrong_type(&format!("a string such as \"{example}\"")))
    }

    /// `true` or `false`.
    pub(super) fn boolean(&self) -> Result<bool, Error> {
        self.value
            .as_bool()
            .ok_or_else(|| self.wrong_type("true or false"))
    }

    /// An integer of `first..=last`.
    pub(super) fn integer(&self, first: u32, last: u32) -> Result<u32, Error> {
        self.integer_of(self.value, self.offset, first, last)
    }

    fn integer_of(
        &self,
        value: &DeValue<'_>,
        offset: usize,
        first: u32,
        last: u32,
    ) -> Result<u32, Error> {
        let integer = value.as_integer().ok_or_else(|| {
            let expected = format!("an integer from {first} to {last}");
            self.wrong_type_of(value, offset, &expected)
        })?;
        i128::from_str_radix(integer.as_str(), integer.radix())
            .ok()
            .and_then(|number| u32::try_from(number).ok())
            .filter(|number| (first..=last).contains(number))
            .ok_or_else(|| {
                let number = shorten(integer.as_str());
                let message = format!(
                    "{} {number} is out of range; choose {first} to {last}",
                    self.key
                );
                self.section.error(offset, message)
            })
    }

    /// A list of strings, each with its place.
    pub(super) fn texts(&self, example: &str) -> Result<Vec<At<&'a str>>, Error> {
        let expected = format!("a list of strings such as [\"{example}\"]");
        let array = self
            .value
            .as_array()
            .ok_or_else(|| self.wrong_type(&expected))?;
        array
            .iter()
            .map(|item| {
                let offset = item.span().start;
                let value = item
                    .get_ref()
                    .as_str()
                    .ok_or_else(|| self.wrong_type_of(item.get_ref(), offset, &expected))?;
                Ok(At { value, offset })
            })
            .collect()
    }

    /// The items of a list, or the one value that stands for a list of one, as text; integers must
    /// be of `first..=last`.
    pub(super) fn words(
        &self,
        example: &str,
        first: u32,
        last: u32,
    ) -> Result<Vec<At<String>>, Error> {
        let word = |value: &DeValue<'_>, offset| {
            let text = match value {
                DeValue::String(text) => text.to_string(),
                DeValue::Integer(_) => self.integer_of(value, offset, first, last)?.to_string(),
                _ => {
                    let expected = format!("a string such as \"{example}\", or a list of them");
                    return Err(self.wrong_type_of(value, offset, &expected));
                }
            };
            Ok(At {
                value: text,
                offset,
            })
        };
        match self.value {
            DeValue::Array(items) => items
                .iter()
                .map(|item: &Spanned<DeValue<'_>>| word(item.get_ref(), item.span().start))
                .collect(),
            value => Ok(vec![word(value, self.offset)?]),
        }
    }
}

/// The operator's text between quotation marks, shortened.
pub(super) fn quote(text: &str) -> String {
    format!("\"{}\"", shorten(text))
}

fn shorten(text: &str) -> String {
    match text.char_indices().nth(QUOTE_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// The one of `known` that `word` was probably meant to be, between quotation marks.
pub(super) fn closest(word: &str, known: &[&str]) -> Option<String> {
    if word.chars().count() > 2 * QUOTE_CHARS {
        return None;
    }
    known
        .iter()
        .map(|candidate| {
            (
                strsim::normalized_damerau_levenshtein(word, candidate),
                candidate,
            )
        })
        .filter(|(likeness, _)| *likeness >= 0.5)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, candidate)| quote(candidate))
}
