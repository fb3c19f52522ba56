//! Reads the type information (BTF) that the BPF object carries: what the kernel and `bpftool`
//! know of the maps.
//!
//! Only what maps need: structures, members, integers, arrays and pointers. The format is described
//! in the kernel's `Documentation/bpf/btf.rst`.

/// A type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Type {
    /// Integer: name and size.
    Int(String, u32),
    /// Pointer to another type.
    Pointer(u32),
    /// Array: element type and length.
    Array(u32, u32),
    /// Structure.
    Struct(Struct),
    /// Variable: name and type.
    Variable(String, u32),
    /// Anything else.
    Other,
}

/// A structure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Struct {
    /// Name, with generic arguments mangled by the compiler.
    pub name: String,
    /// Size in bytes.
    pub size: u32,
    /// Members in order.
    pub members: Vec<Member>,
}

/// A member of a structure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Name.
    pub name: String,
    /// Type.
    pub kind: u32,
    /// Offset in bytes.
    pub offset: u32,
}

/// All types of an object.
pub struct Btf {
    types: Vec<Type>,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> usize {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes")) as usize
}

fn text(bytes: &[u8], at: usize) -> String {
    let end = bytes[at..].iter().position(|b| *b == 0).expect("a zero") + at;
    String::from_utf8_lossy(&bytes[at..end]).into_owned()
}

/// The contents of a section of a little-endian ELF64 file.
fn section<'a>(elf: &'a [u8], wanted: &str) -> &'a [u8] {
    assert_eq!(&elf[..6], b"\x7fELF\x02\x01", "a little-endian ELF64 file");
    let (table, entry, names) = (
        u64_at(elf, 40),
        usize::from(u16_at(elf, 58)),
        usize::from(u16_at(elf, 62)),
    );
    let header = |n: usize| &elf[table + n * entry..][..entry];
    let body = |h: &[u8]| &elf[u64_at(h, 24)..][..u64_at(h, 32)];
    let names = body(header(names));
    (0..usize::from(u16_at(elf, 60)))
        .map(header)
        .find(|h| text(names, u32_at(h, 0) as usize) == wanted)
        .map(body)
        .unwrap_or_else(|| panic!("the object has no section {wanted}"))
}

impl Btf {
    /// Reads the types of an object file.
    ///
    /// # Panics
    /// If it is not an ELF file with BTF.
    #[must_use]
    pub fn of_object(elf: &[u8]) -> Self {
        let btf = section(elf, ".BTF");
        assert_eq!(u16_at(btf, 0), 0xeb9f, "the magic number of BTF");
        let header = u32_at(btf, 4) as usize;
        let part = |at: usize| {
            let (offset, len) = (u32_at(btf, at) as usize, u32_at(btf, at + 4) as usize);
            &btf[header + offset..][..len]
        };
        let (mut rest, names) = (part(8), part(16));
        let name = |at: u32| text(names, at as usize);
        // Type 0 is void.
        let mut types = vec![Type::Other];
        while !rest.is_empty() {
            let (info, third) = (u32_at(rest, 4), u32_at(rest, 8));
            let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            let own = name(u32_at(rest, 0));
            rest = &rest[12..];
            let (kind, len) = match kind {
                1 => (Type::Int(own, third), 4),
                2 => (Type::Pointer(third), 0),
                3 => (Type::Array(u32_at(rest, 0), u32_at(rest, 8)), 12),
                4 | 5 => {
                    let members = rest
                        .chunks_exact(12)
                        .take(count)
                        .map(|m| Member {
                            name: name(u32_at(m, 0)),
                            kind: u32_at(m, 4),
                            offset: u32_at(m, 8) / 8,
                        })
                        .collect();
                    let record = Struct {
                        name: own,
                        size: third,
                        members,
                    };
                    (Type::Struct(record), 12 * count)
                }
                6 | 15 | 19 => (
                    Type::Other,
                    if kind == 19 {
                        12
                    } else {
                        8 + 4 * usize::from(kind == 15)
                    } * count,
                ),
                13 => (Type::Other, 8 * count),
                14 => (Type::Variable(own, third), 4),
                17 => (Type::Other, 4),
                _ => (Type::Other, 0),
            };
            types.push(kind);
            rest = &rest[len..];
        }
        Self { types }
    }

    /// The type of number `id`.
    #[must_use]
    pub fn get(&self, id: u32) -> &Type {
        &self.types[id as usize]
    }

    /// Names of all map variables.
    #[must_use]
    pub fn maps(&self) -> Vec<&str> {
        let is_map = |id: u32| match self.get(id) {
            Type::Struct(s) => s.members.iter().any(|m| m.name == "max_entries"),
            _ => false,
        };
        self.types
            .iter()
            .filter_map(|t| match t {
                Type::Variable(name, id) if is_map(*id) => Some(name.as_str()),
                _ => None,
            })
            .collect()
    }

    /// The type of a map's `key` or `value`.
    ///
    /// # Panics
    /// If there is no such map, or it does not tell.
    #[must_use]
    pub fn of_map(&self, map: &str, part: &str) -> &Type {
        let definition = self
            .types
            .iter()
            .find_map(|t| match t {
                Type::Variable(name, id) if name == map => Some(self.get(*id)),
                _ => None,
            })
            .unwrap_or_else(|| panic!("the object's BTF has no map {map}"));
        let Type::Struct(definition) = definition else {
            panic!("map {map} is not defined by a structure");
        };
        let member = definition
            .members
            .iter()
            .find(|m| m.name == part)
            .unwrap_or_else(|| panic!("map {map} does not tell its {part}"));
        match self.get(member.kind) {
            Type::Pointer(id) => self.get(*id),
            other => panic!("the {part} of map {map} is told by {other:?}, not by a pointer"),
        }
    }

    /// Size of a type in bytes.
    #[must_use]
    pub fn size(&self, kind: &Type) -> u32 {
        match kind {
            Type::Int(_, size) => *size,
            Type::Pointer(_) => 8,
            Type::Array(element, len) => self.size(self.get(*element)) * len,
            Type::Struct(s) => s.size,
            Type::Variable(_, id) => self.size(self.get(*id)),
            Type::Other => 0,
        }
    }
}
