//! Thin wrappers over the `bpf` system call, where aya has none or does more than is wanted.
//!
//! Each is one command of bpf(2); errors are those of the kernel.

use super::tcx::Direction;
use std::{
    ffi::{CStr, CString},
    io,
    net::{Ipv4Addr, UdpSocket},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

pub use aya_obj::generated::bpf_map_type;
use aya_obj::generated::{
    bpf_attach_type, bpf_attr, bpf_cmd, bpf_link_info, bpf_link_type, bpf_map_info, bpf_prog_info,
    bpf_prog_type,
};

/// `bpf_map_update_elem` flag: only a key that is not there yet.
pub const NOEXIST: u64 = 1;

/// What the kernel says of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapInfo {
    /// The kernel's number for it.
    pub id: u32,
    /// Name, at most 15 characters.
    pub name: String,
    /// `BPF_MAP_TYPE_*`.
    pub kind: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Entries it has room for.
    pub max_entries: u32,
    /// `BPF_F_*`.
    pub flags: u32,
}

/// What the kernel says of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramInfo {
    /// The kernel's number for it.
    pub id: u32,
    /// Name, at most 15 characters.
    pub name: String,
    /// Hash of its instructions, as `bpftool` prints it.
    pub tag: String,
    /// Instructions the verifier walked; 0 where the kernel does not tell (before 5.16).
    pub verified_instructions: u32,
}

/// What the kernel says of an XDP link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XdpLinkInfo {
    /// The kernel's number for it.
    pub id: u32,
    /// The program it runs.
    pub program: u32,
    /// The interface it is on; 0: the interface is gone, and the link with it.
    pub ifindex: u32,
}

/// One run of a program on one packet, without an interface.
#[derive(Clone, Debug, Default)]
pub struct TestRun {
    /// What the program returned.
    pub verdict: u32,
    /// The packet afterwards.
    pub data: Vec<u8>,
    /// Mean time of one repetition in ns, as the kernel measured it.
    pub duration: u32,
}

fn zeroed() -> bpf_attr {
    // SAFETY: bpf_attr is a union of plain integers; the kernel demands zero in what a command
    // does not use.
    unsafe { std::mem::zeroed() }
}

fn bpf(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i64> {
    // SAFETY: `attr` is valid for the length given; each caller below keeps the memory its
    // pointers name alive over the call and sized as the kernel's documentation of the command
    // asks.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            cmd as libc::c_long,
            std::ptr::from_mut(attr),
            size_of::<bpf_attr>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn bpf_fd(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    let fd = bpf(cmd, attr)?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn raw(fd: impl AsFd) -> u32 {
    fd.as_fd().as_raw_fd().cast_unsigned()
}

fn path_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "path contains a zero byte"))
}

/// The attributes of a command on one element. `value` is also where the next key goes.
fn element(map: BorrowedFd<'_>, key: *const u8, value: *const u8, flags: u64) -> bpf_attr {
    let mut attr = zeroed();
    // SAFETY: only writes plain integers of the union's variant for element commands.
    unsafe {
        let elem = &mut attr.__bindgen_anon_2;
        elem.map_fd = raw(map);
        elem.key = key as u64;
        elem.__bindgen_anon_1.value = value as u64;
        elem.flags = flags;
    }
    attr
}

fn found(result: io::Result<i64>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Copies the value of `key` into `value`; `false` if there is none.
///
/// `value` must have the map's value size, times the number of possible CPUs (each rounded up to
/// eight bytes) for a per-CPU map.
pub fn lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let mut attr = element(map, key.as_ptr(), value.as_mut_ptr(), 0);
    found(bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr))
}

/// Sets the value of `key`.
pub fn update(map: BorrowedFd<'_>, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
    let mut attr = element(map, key.as_ptr(), value.as_ptr(), flags);
    bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Removes `key`; `false` if it was not there.
pub fn delete(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<bool> {
    let mut attr = element(map, key.as_ptr(), std::ptr::null(), 0);
    found(bpf(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut attr))
}

/// Removes `key` and copies its last value into `value`; `false` if it was not there.
pub fn lookup_and_delete(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let mut attr = element(map, key.as_ptr(), value.as_mut_ptr(), 0);
    found(bpf(bpf_cmd::BPF_MAP_LOOKUP_AND_DELETE_ELEM, &mut attr))
}

/// Copies the key after `key` (or the first) into `next`; `false` at the end.
pub fn next_key(map: BorrowedFd<'_>, key: Option<&[u8]>, next: &mut [u8]) -> io::Result<bool> {
    let key = key.map_or(std::ptr::null(), <[u8]>::as_ptr);
    let mut attr = element(map, key, next.as_mut_ptr(), 0);
    found(bpf(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut attr))
}

/// Where a batch lookup goes on. The kernel keeps a bucket number or a key in it.
#[derive(Clone, Debug)]
pub struct BatchCursor {
    place: Vec<u8>,
    started: bool,
}

impl BatchCursor {
    /// The beginning of a map with keys of `key_size` bytes.
    #[must_use]
    pub fn new(key_size: usize) -> Self {
        Self {
            place: vec![0; key_size.max(size_of::<u64>())],
            started: false,
        }
    }
}

/// Copies up to `room` entries from `cursor` on. Returns how many, and whether there are more.
///
/// `keys` and `values` must have room for them. Fails with `ENOSPC` when the next hash bucket
/// alone holds more than `room`.
pub fn lookup_batch(
    map: BorrowedFd<'_>,
    cursor: &mut BatchCursor,
    keys: &mut [u8],
    values: &mut [u8],
    room: u32,
) -> io::Result<(usize, bool)> {
    let mut next = vec![0u8; cursor.place.len()];
    let mut attr = zeroed();
    attr.batch.map_fd = raw(map);
    attr.batch.in_batch = if cursor.started {
        cursor.place.as_ptr() as u64
    } else {
        0
    };
    attr.batch.out_batch = next.as_mut_ptr() as u64;
    attr.batch.keys = keys.as_mut_ptr() as u64;
    attr.batch.values = values.as_mut_ptr() as u64;
    attr.batch.count = room;
    let result = bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr);
    // SAFETY: plain integers; the kernel has written the number of entries it copied.
    let count = unsafe { attr.batch.count } as usize;
    let more = found(result)?;
    cursor.place = next;
    cursor.started = true;
    Ok((count, more))
}

/// Pins a map, program or link at `path`.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = path_string(path)?;
    let mut attr = zeroed();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    attr.__bindgen_anon_4.bpf_fd = raw(object);
    bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Opens what is pinned at `path`.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = path_string(path)?;
    let mut attr = zeroed();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    bpf_fd(bpf_cmd::BPF_OBJ_GET, &mut attr)
}

/// What a descriptor of a BPF object stands for: `bpf-map`, `bpf-prog` or `bpf_link`.
pub fn object_kind(object: BorrowedFd<'_>) -> io::Result<String> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", object.as_raw_fd()))?;
    let link = link.to_string_lossy();
    Ok(link
        .strip_prefix("anon_inode:")
        .unwrap_or(&link)
        .trim_matches(['[', ']'])
        .to_owned())
}

/// Asks for the information record `T` of `object`.
///
/// # Safety
/// `T` must be the kernel's record for this kind of object: integers only, all zero being valid.
unsafe fn info<T>(object: BorrowedFd<'_>) -> io::Result<T> {
    // SAFETY: the caller vouches for `T`.
    let mut info: T = unsafe { std::mem::zeroed() };
    let mut attr = zeroed();
    attr.info.bpf_fd = raw(object);
    attr.info.info_len = u32::try_from(size_of::<T>()).map_err(io::Error::other)?;
    attr.info.info = std::ptr::from_mut(&mut info) as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

/// What the kernel says of `map`.
pub fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    // SAFETY: bpf_map_info is integers only.
    let info: bpf_map_info = unsafe { info(map)? };
    Ok(MapInfo {
        id: info.id,
        name: text(&info.name),
        kind: info.type_,
        key_size: info.key_size,
        value_size: info.value_size,
        max_entries: info.max_entries,
        flags: info.map_flags,
    })
}

/// A name in one of the kernel's records.
fn text(name: &[libc::c_char]) -> String {
    let name: Vec<u8> = name.iter().map(|c| c.cast_unsigned()).collect();
    CStr::from_bytes_until_nul(&name)
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// What the kernel says of `program`.
pub fn program_info(program: BorrowedFd<'_>) -> io::Result<ProgramInfo> {
    // SAFETY: bpf_prog_info is integers only; with zero lengths the kernel follows no pointer.
    let info: bpf_prog_info = unsafe { info(program)? };
    Ok(ProgramInfo {
        id: info.id,
        name: text(&info.name),
        tag: info.tag.iter().map(|b| format!("{b:02x}")).collect(),
        verified_instructions: info.verified_insns,
    })
}

/// The kernel's numbers of the maps that `program` uses, as many as `room`.
pub fn program_maps(program: BorrowedFd<'_>, room: usize) -> io::Result<Vec<u32>> {
    let mut ids = vec![0u32; room];
    // SAFETY: bpf_prog_info is integers only.
    let mut info: bpf_prog_info = unsafe { std::mem::zeroed() };
    info.nr_map_ids = u32::try_from(room).map_err(io::Error::other)?;
    info.map_ids = ids.as_mut_ptr() as u64;
    let mut attr = zeroed();
    attr.info.bpf_fd = raw(program);
    attr.info.info_len = u32::try_from(size_of::<bpf_prog_info>()).map_err(io::Error::other)?;
    attr.info.info = std::ptr::from_mut(&mut info) as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    ids.truncate(info.nr_map_ids as usize);
    Ok(ids)
}

/// What the kernel says of `link`; `None` if it is not an XDP link.
pub fn xdp_link_info(link: BorrowedFd<'_>) -> io::Result<Option<XdpLinkInfo>> {
    // SAFETY: bpf_link_info is integers only.
    let info: bpf_link_info = unsafe { info(link)? };
    if info.type_ != bpf_link_type::BPF_LINK_TYPE_XDP as u32 {
        return Ok(None);
    }
    Ok(Some(XdpLinkInfo {
        id: info.id,
        program: info.prog_id,
        // SAFETY: the type says that this variant was written.
        ifindex: unsafe { info.__bindgen_anon_1.xdp.ifindex },
    }))
}

/// The interface that a TCX link has its program on, 0 if that is gone; `None` if it is another
/// kind of link.
pub fn tcx_link_interface(link: BorrowedFd<'_>) -> io::Result<Option<u32>> {
    // SAFETY: bpf_link_info is integers only.
    let info: bpf_link_info = unsafe { info(link)? };
    if info.type_ != bpf_link_type::BPF_LINK_TYPE_TCX as u32 {
        return Ok(None);
    }
    // SAFETY: the type says that this variant was written.
    Ok(Some(unsafe { info.__bindgen_anon_1.tcx.ifindex }))
}

/// Puts a program of type `SCHED_CLS` between an interface and the network stack, behind those
/// that are there, by a link. Needs Linux 6.6.
pub fn link_tcx(
    program: BorrowedFd<'_>,
    ifindex: u32,
    direction: Direction,
) -> io::Result<OwnedFd> {
    let hook = match direction {
        Direction::Ingress => bpf_attach_type::BPF_TCX_INGRESS,
        Direction::Egress => bpf_attach_type::BPF_TCX_EGRESS,
    };
    let mut attr = zeroed();
    attr.link_create.__bindgen_anon_1.prog_fd = raw(program);
    attr.link_create.__bindgen_anon_2.target_ifindex = ifindex;
    attr.link_create.attach_type = hook as u32;
    bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr)
}

/// Puts a program at a hook of a cgroup, beside those that are there, by a link. `hook`:
/// `BPF_CGROUP_*`.
pub fn link_cgroup(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    hook: bpf_attach_type,
) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    attr.link_create.__bindgen_anon_1.prog_fd = raw(program);
    attr.link_create.__bindgen_anon_2.target_fd = raw(cgroup);
    attr.link_create.attach_type = hook as u32;
    bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr)
}

/// The kernel's number of the cgroup that a link has its program on, 0 if that is gone; `None` if
/// it is another kind of link.
pub fn cgroup_link(link: BorrowedFd<'_>) -> io::Result<Option<u64>> {
    // SAFETY: bpf_link_info is integers only.
    let info: bpf_link_info = unsafe { info(link)? };
    if info.type_ != bpf_link_type::BPF_LINK_TYPE_CGROUP as u32 {
        return Ok(None);
    }
    // SAFETY: the type says that this variant was written.
    Ok(Some(unsafe { info.__bindgen_anon_1.cgroup.cgroup_id }))
}

/// The kernel's cookie of this thread's network namespace, which is never given twice. Needs Linux
/// 5.14.
pub fn netns_cookie() -> io::Result<u64> {
    // asm-generic/socket.h; libc has no name for it.
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to the cookie.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    match result {
        0 => Ok(cookie),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Opens a program by the kernel's number for it. Needs `CAP_SYS_ADMIN`.
pub fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    by_id(bpf_cmd::BPF_PROG_GET_FD_BY_ID, id)
}

/// Opens a map by the kernel's number for it. Needs `CAP_SYS_ADMIN`.
pub fn map_by_id(id: u32) -> io::Result<OwnedFd> {
    by_id(bpf_cmd::BPF_MAP_GET_FD_BY_ID, id)
}

/// Opens a link by the kernel's number for it. Needs `CAP_SYS_ADMIN`.
pub fn link_by_id(id: u32) -> io::Result<OwnedFd> {
    by_id(bpf_cmd::BPF_LINK_GET_FD_BY_ID, id)
}

fn by_id(cmd: bpf_cmd, id: u32) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    attr.__bindgen_anon_6.__bindgen_anon_1.start_id = id;
    bpf_fd(cmd, &mut attr)
}

/// The XDP link that runs program `program` on interface `ifindex`, if there is one and we may
/// ask. Needs `CAP_SYS_ADMIN`.
#[must_use]
pub fn find_xdp_link(ifindex: u32, program: u32) -> Option<XdpLinkInfo> {
    let mut id = 0;
    loop {
        let mut attr = zeroed();
        attr.__bindgen_anon_6.__bindgen_anon_1.start_id = id;
        bpf(bpf_cmd::BPF_LINK_GET_NEXT_ID, &mut attr).ok()?;
        // SAFETY: plain integer, written by the kernel.
        id = unsafe { attr.__bindgen_anon_6.next_id };
        let Ok(link) = link_by_id(id) else {
            continue; // gone in the meantime
        };
        if let Ok(Some(info)) = xdp_link_info(link.as_fd())
            && info.ifindex == ifindex
            && info.program == program
        {
            return Some(info);
        }
    }
}

/// Attaches an XDP program to an interface by a link. `flags`: `XDP_FLAGS_*`.
pub fn link_xdp(program: BorrowedFd<'_>, ifindex: u32, flags: u32) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    attr.link_create.__bindgen_anon_1.prog_fd = raw(program);
    attr.link_create.__bindgen_anon_2.target_ifindex = ifindex;
    attr.link_create.attach_type = bpf_attach_type::BPF_XDP as u32;
    attr.link_create.flags = flags;
    bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr)
}

/// Makes `link` run `program` from the next packet on.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = zeroed();
    attr.link_update.link_fd = raw(link);
    attr.link_update.__bindgen_anon_1.new_prog_fd = raw(program);
    bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Takes the program of `link` off its interface, whoever else holds the link.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = zeroed();
    attr.link_detach.link_fd = raw(link);
    bpf(bpf_cmd::BPF_LINK_DETACH, &mut attr).map(drop)
}

/// Loads the XDP program `return XDP_PASS`.
pub fn load_xdp_pass() -> io::Result<OwnedFd> {
    // mov r0, XDP_PASS; exit
    let instructions: [u64; 2] = [0x0000_0002_0000_00b7, 0x0000_0000_0000_0095];
    let mut attr = zeroed();
    // SAFETY: only writes plain integers of the union's variant for loading; `instructions`
    // outlives the call.
    unsafe {
        let load = &mut attr.__bindgen_anon_3;
        load.prog_type = bpf_prog_type::BPF_PROG_TYPE_XDP as u32;
        load.insns = instructions.as_ptr() as u64;
        load.insn_cnt = 2;
        load.license = c"GPL".as_ptr() as u64;
        for (to, from) in load.prog_name.iter_mut().zip(b"stub_pass") {
            *to = from.cast_signed();
        }
    }
    bpf_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr)
}

/// Runs an XDP program `repeat` times on `packet`, as if it had come in on interface `ifindex`
/// (0: the loopback interface) and receive queue 0.
pub fn test_run(
    program: BorrowedFd<'_>,
    packet: &[u8],
    ifindex: u32,
    repeat: u32,
) -> io::Result<TestRun> {
    // Room for the headers an encapsulation may add.
    let mut out = vec![0u8; packet.len() + 512];
    let length = |n: usize| u32::try_from(n).map_err(io::Error::other);
    // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
    let context: [u32; 6] = [0, length(packet.len())?, 0, ifindex, 0, 0];
    let mut attr = zeroed();
    attr.test.prog_fd = raw(program);
    attr.test.data_in = packet.as_ptr() as u64;
    attr.test.data_size_in = length(packet.len())?;
    attr.test.data_out = out.as_mut_ptr() as u64;
    attr.test.data_size_out = length(out.len())?;
    attr.test.repeat = repeat;
    if ifindex != 0 {
        attr.test.ctx_in = context.as_ptr() as u64;
        attr.test.ctx_size_in = length(size_of_val(&context))?;
    }
    bpf(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr)?;
    // SAFETY: plain integers, written by the kernel.
    let test = unsafe { attr.test };
    out.truncate(test.data_size_out as usize);
    Ok(TestRun {
        verdict: test.retval,
        data: out,
        duration: test.duration,
    })
}
