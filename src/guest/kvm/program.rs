//! The guest program: assembler text, assembled with the rest of the crate into read-only data and
//! copied into guest RAM at boot. It runs at any address, needs no segment, interrupt or SSE, and
//! does exactly what [`Worker`] does in Rust (a test compares the memory they leave behind).
//!
//! It asks the host for work through I/O ports, forever: one `out` reports the counters in
//! registers, one `in` fetches the next task. The host answers late to slow it down, so the guest
//! needs no clock.
#![allow(unsafe_code)]

use std::mem::offset_of;

use super::super::workload::page::{
    BODY_WORD, BODY_WORDS, CONTENT_ADD, CONTENT_STEP, SCATTER_FIRST, SCATTER_SECOND, SEED,
    SPARSE_WORDS, SUM_WORD, SUMS_WORD, Stream, TAG, WORDS,
};
use super::super::workload::{GuestStatus, Mode, Task, Worker};

/// Bytes written here are the guest's console.
pub(super) const CONSOLE_PORT: u16 = 0xe9;
/// A write here says that the counters are in the registers; see [`status_from`].
pub(super) const REPORT_PORT: u16 = 0xf4;
/// A four-byte read from here fetches a task; see [`encode`].
pub(super) const TASK_PORT: u16 = 0xf5;

const TASK_VERIFY: u32 = 1 << 31;
const TASK_COUNT: u32 = TASK_VERIFY - 1;

/// The worker's fields in guest memory. The stack grows down from the end of the same page.
#[repr(C)]
struct WorkerPage {
    /// Number of the vCPU; the first one greets on the console.
    id: u64,
    mode: u64,
    cold_every: u64,
    ops: u64,
    sweeps: u64,
    verified: u64,
    wrong: u64,
    first_wrong: u64,
    cursor: u64,
    streams: [Stream; 2],
}

/// A worker's fields as pairs of byte offset in its page and value.
pub(super) fn worker_fields(id: u64, worker: &Worker) -> Vec<(usize, u64)> {
    let mut fields = vec![
        (offset_of!(WorkerPage, id), id),
        (offset_of!(WorkerPage, mode), worker.mode.bits()),
        (offset_of!(WorkerPage, cold_every), worker.cold_every),
        (offset_of!(WorkerPage, ops), worker.ops),
        (offset_of!(WorkerPage, sweeps), worker.sweeps),
        (offset_of!(WorkerPage, verified), worker.verified),
        (offset_of!(WorkerPage, wrong), worker.wrong),
        (offset_of!(WorkerPage, first_wrong), worker.first_wrong),
        (offset_of!(WorkerPage, cursor), worker.cursor),
    ];
    for (i, stream) in worker.streams.iter().enumerate() {
        let base = offset_of!(WorkerPage, streams) + i * size_of::<Stream>();
        fields.extend([
            (base + offset_of!(Stream, first_page), stream.first_page),
            (base + offset_of!(Stream, count), stream.count),
            (base + offset_of!(Stream, mask), stream.mask),
            (base + offset_of!(Stream, shift), stream.shift),
            (base + offset_of!(Stream, sequence), stream.sequence),
            (base + offset_of!(Stream, written), stream.written),
        ]);
    }
    fields
}

/// The counters that the guest has put into registers before it writes to [`REPORT_PORT`].
pub(super) fn status_from(regs: &kvm_bindings::kvm_regs) -> GuestStatus {
    GuestStatus {
        ops: regs.rbx,
        sweeps: regs.rcx,
        pages_verified: regs.rsi,
        wrong_pages: regs.rdi,
        first_wrong_page: regs.r8,
    }
}

/// A task as the guest reads it; no task is a task of no steps, after which the guest asks again.
pub(super) fn encode(task: Option<Task>) -> u32 {
    match task {
        None => 0,
        Some(Task::Work(ops)) => ops,
        Some(Task::Verify(pages)) => pages | TASK_VERIFY,
    }
}

/// The program's bytes. Entered at the first one, with the address of the worker's page in `rbp`, a
/// stack in `rsp` and the number of operations done so far in `r15`.
pub(super) fn image() -> &'static [u8] {
    unsafe extern "C" {
        static farfault_guest_start: u8;
        static farfault_guest_end: u8;
    }
    let (start, end) = (&raw const farfault_guest_start, &raw const farfault_guest_end);
    // SAFETY: both labels are in one section of one assembler block (below), `end` behind `start`;
    // what lies between them is initialised and never written.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

// Registers: rbp worker's page, r15 operations done, r14 steps left in the task, r13 stream,
// r12 sequence number, r11 page number, rdi page address; the others are free within a step.
std::arch::global_asm!(
    ".pushsection .rodata.farfault_guest, \"a\", @progbits",
    ".globl farfault_guest_start",
    ".globl farfault_guest_end",
    ".hidden farfault_guest_start",
    ".hidden farfault_guest_end",
    "farfault_guest_start:",
    "    cmp     qword ptr [rbp + {ID}], 0",
    "    jne     .Lff_ask",
    "    lea     rsi, [rip + .Lff_greeting]",
    ".Lff_greet:",
    "    mov     al, [rsi]",
    "    test    al, al",
    "    jz      .Lff_ask",
    "    out     {CONSOLE_PORT}, al",
    "    inc     rsi",
    "    jmp     .Lff_greet",

    // The operation counter is in a register and in memory: they travel by different ways, and must
    // meet again.
    ".Lff_ask:",
    "    cmp     r15, [rbp + {OPS}]",
    "    je      .Lff_report",
    "    inc     qword ptr [rbp + {WRONG}]",
    "    mov     r15, [rbp + {OPS}]",
    ".Lff_report:",
    "    mov     rbx, r15",
    "    mov     rcx, [rbp + {SWEEPS}]",
    "    mov     rsi, [rbp + {VERIFIED}]",
    "    mov     rdi, [rbp + {WRONG}]",
    "    mov     r8, [rbp + {FIRST_WRONG}]",
    "    out     {REPORT_PORT}, al",
    "    in      eax, {TASK_PORT}",
    "    mov     r14d, eax",
    "    and     r14d, {TASK_COUNT}",
    "    jz      .Lff_ask",
    "    test    eax, eax",
    "    js      .Lff_sweep",

    // One operation: choose the stream, then the page.
    ".Lff_operate:",
    "    lea     r13, [rbp + {HOT}]",
    "    mov     rcx, [rbp + {COLD_EVERY}]",
    "    test    rcx, rcx",
    "    jz      .Lff_chosen",
    "    mov     rax, r15",
    "    xor     edx, edx",
    "    div     rcx",
    "    test    rdx, rdx",
    "    jnz     .Lff_chosen",
    "    lea     r13, [rbp + {COLD}]",
    ".Lff_chosen:",
    "    mov     r12, [r13 + {SEQUENCE}]",
    "    mov     rax, r12",
    "    call    .Lff_page_of",
    "    mov     r11, rax",
    "    shl     rax, 12",
    "    mov     rdi, rax",
    "    mov     rax, [rbp + {MODE}]",
    "    test    eax, {WRITES}",
    "    jz      .Lff_read",
    "    test    eax, {WHOLE_PAGES}",
    "    jnz     .Lff_whole",

    // Sparse: check the head, then change the sequence number and some words, and both sums by the
    // differences (r8 and r9).
    "    mov     rax, {TAG}",
    "    xor     rax, r11",
    "    cmp     rax, [rdi]",
    "    jne     .Lff_head_wrong",
    "    mov     rax, r12",
    "    sub     rax, [r13 + {COUNT}]",
    "    cmp     rax, [rdi + 8]",
    "    je      .Lff_head_right",
    ".Lff_head_wrong:",
    "    call    .Lff_found_wrong",
    ".Lff_head_right:",
    "    mov     r8, [rdi + {SUM}]",
    "    mov     r9, [rdi + {SUMS}]",
    "    mov     rax, r12",
    "    sub     rax, [rdi + 8]",
    "    mov     [rdi + 8], r12",
    "    add     r8, rax",
    "    imul    rax, rax, {SUM_WORD} - 1",
    "    add     r9, rax",
    "    mov     r10, {SEED}",
    "    imul    r10, r12",
    "    add     r10, r11",
    "    mov     esi, {SPARSE_WORDS}",
    ".Lff_sparse_word:",
    "    mov     rax, {CONTENT_STEP}",
    "    imul    r10, rax",
    "    mov     rax, {CONTENT_ADD}",
    "    add     r10, rax",
    "    mov     rax, r10",
    "    shr     rax, 32",
    "    imul    rax, rax, {BODY_WORDS}",
    "    shr     rax, 32",
    "    add     rax, {BODY_WORD}",
    "    mov     rdx, r10",
    "    shr     rdx, 48",
    "    mov     rcx, rdx",
    "    sub     rcx, [rdi + rax*8]",
    "    mov     [rdi + rax*8], rdx",
    "    add     r8, rcx",
    "    neg     rax",
    "    add     rax, {SUM_WORD}",
    "    imul    rcx, rax",
    "    add     r9, rcx",
    "    dec     esi",
    "    jnz     .Lff_sparse_word",
    "    jmp     .Lff_written",

    // Whole page: check it, then make it anew.
    ".Lff_whole:",
    "    call    .Lff_verify",
    "    mov     rax, {TAG}",
    "    xor     rax, r11",
    "    mov     [rdi], rax",
    "    mov     [rdi + 8], r12",
    "    mov     r8, rax",
    "    mov     r9, rax",
    "    add     r8, r12",
    "    add     r9, r8",
    "    mov     r10, {SEED}",
    "    imul    r10, r12",
    "    add     r10, r11",
    "    mov     rbx, {CONTENT_STEP}",
    "    mov     rdx, {CONTENT_ADD}",
    "    lea     rsi, [rdi + 8*{BODY_WORD}]",
    "    mov     ecx, {BODY_WORDS}",
    ".Lff_whole_word:",
    "    imul    r10, rbx",
    "    add     r10, rdx",
    "    mov     rax, r10",
    "    shr     rax, 48",
    "    mov     [rsi], rax",
    "    add     r8, rax",
    "    add     r9, r8",
    "    add     rsi, 8",
    "    dec     ecx",
    "    jnz     .Lff_whole_word",

    ".Lff_written:",
    "    mov     [rdi + {SUM}], r8",
    "    mov     [rdi + {SUMS}], r9",
    "    lea     rax, [r12 + 1]",
    "    mov     [r13 + {WRITTEN}], rax",
    ".Lff_operated:",
    "    inc     r12",
    "    mov     [r13 + {SEQUENCE}], r12",
    "    inc     r15",
    "    mov     [rbp + {OPS}], r15",
    "    dec     r14d",
    "    jnz     .Lff_operate",
    "    jmp     .Lff_ask",
    ".Lff_read:",
    "    call    .Lff_verify",
    "    jmp     .Lff_operated",

    // The sweep: check the page at the cursor.
    ".Lff_sweep:",
    "    lea     r13, [rbp + {HOT}]",
    "    mov     rax, [rbp + {CURSOR}]",
    "    cmp     rax, [r13 + {COUNT}]",
    "    jb      .Lff_sweep_page",
    "    sub     rax, [r13 + {COUNT}]",
    "    lea     r13, [rbp + {COLD}]",
    ".Lff_sweep_page:",
    "    add     rax, [r13 + {FIRST_PAGE}]",
    "    mov     r11, rax",
    "    shl     rax, 12",
    "    mov     rdi, rax",
    "    call    .Lff_verify",
    "    mov     rcx, [rbp + {HOT} + {COUNT}]",
    "    add     rcx, [rbp + {COLD} + {COUNT}]",
    "    mov     rax, [rbp + {CURSOR}]",
    "    inc     rax",
    "    cmp     rax, rcx",
    "    jb      .Lff_swept",
    "    xor     eax, eax",
    "    inc     qword ptr [rbp + {SWEEPS}]",
    ".Lff_swept:",
    "    mov     [rbp + {CURSOR}], rax",
    "    dec     r14d",
    "    jnz     .Lff_sweep",
    "    jmp     .Lff_ask",

    // Stream::page_of: sequence number in rax, page number out in rax.
    ".Lff_page_of:",
    "    xor     edx, edx",
    "    div     qword ptr [r13 + {COUNT}]",
    "    mov     rax, rdx",
    "    test    dword ptr [rbp + {MODE}], {SCATTERED}",
    "    jz      .Lff_placed",
    "    mov     rcx, [r13 + {SHIFT}]",
    "    mov     r8, {SCATTER_FIRST}",
    "    mov     r9, {SCATTER_SECOND}",
    "    mov     rbx, [r13 + {MASK}]",
    ".Lff_scatter:",
    "    mov     rdx, rax",
    "    shr     rdx, cl",
    "    xor     rax, rdx",
    "    imul    rax, r8",
    "    and     rax, rbx",
    "    mov     rdx, rax",
    "    shr     rdx, cl",
    "    xor     rax, rdx",
    "    imul    rax, r9",
    "    inc     rax",
    "    and     rax, rbx",
    "    mov     rdx, rax",
    "    shr     rdx, cl",
    "    xor     rax, rdx",
    "    cmp     rax, [r13 + {COUNT}]",
    "    jae     .Lff_scatter",
    ".Lff_placed:",
    "    add     rax, [r13 + {FIRST_PAGE}]",
    "    ret",

    // Stream::holds, counted: page r11 at rdi.
    ".Lff_verify:",
    "    inc     qword ptr [rbp + {VERIFIED}]",
    "    mov     rax, {TAG}",
    "    xor     rax, r11",
    "    cmp     rax, [rdi]",
    "    jne     .Lff_found_wrong",
    "    mov     rcx, [rdi + 8]",
    "    mov     rax, [r13 + {WRITTEN}]",
    "    dec     rax",
    "    sub     rax, rcx",
    "    cmp     rax, [r13 + {COUNT}]",
    "    jae     .Lff_found_wrong",
    "    mov     rax, rcx",
    "    call    .Lff_page_of",
    "    cmp     rax, r11",
    "    jne     .Lff_found_wrong",
    "    mov     rsi, rdi",
    "    xor     eax, eax",
    "    xor     ebx, ebx",
    "    mov     ecx, {SUM_WORD} / 10",
    ".Lff_sum:",
    ".set .Lff_offset, 0",
    ".rept 10",
    "    add     rax, [rsi + .Lff_offset]",
    "    add     rbx, rax",
    ".set .Lff_offset, .Lff_offset + 8",
    ".endr",
    "    add     rsi, 80",
    "    dec     ecx",
    "    jnz     .Lff_sum",
    "    cmp     rax, [rdi + {SUM}]",
    "    jne     .Lff_found_wrong",
    "    cmp     rbx, [rdi + {SUMS}]",
    "    jne     .Lff_found_wrong",
    "    ret",
    ".Lff_found_wrong:",
    "    inc     qword ptr [rbp + {WRONG}]",
    "    cmp     qword ptr [rbp + {FIRST_WRONG}], 0",
    "    jne     .Lff_known",
    "    mov     [rbp + {FIRST_WRONG}], r11",
    ".Lff_known:",
    "    ret",
    ".Lff_greeting:",
    "    .asciz  \"farfault guest: up in 64-bit mode\\n\"",
    "farfault_guest_end:",
    ".popsection",
    ID = const offset_of!(WorkerPage, id),
    MODE = const offset_of!(WorkerPage, mode),
    COLD_EVERY = const offset_of!(WorkerPage, cold_every),
    OPS = const offset_of!(WorkerPage, ops),
    SWEEPS = const offset_of!(WorkerPage, sweeps),
    VERIFIED = const offset_of!(WorkerPage, verified),
    WRONG = const offset_of!(WorkerPage, wrong),
    FIRST_WRONG = const offset_of!(WorkerPage, first_wrong),
    CURSOR = const offset_of!(WorkerPage, cursor),
    HOT = const offset_of!(WorkerPage, streams),
    COLD = const offset_of!(WorkerPage, streams) + size_of::<Stream>(),
    FIRST_PAGE = const offset_of!(Stream, first_page),
    COUNT = const offset_of!(Stream, count),
    MASK = const offset_of!(Stream, mask),
    SHIFT = const offset_of!(Stream, shift),
    SEQUENCE = const offset_of!(Stream, sequence),
    WRITTEN = const offset_of!(Stream, written),
    WRITES = const Mode::WRITES_BIT,
    WHOLE_PAGES = const Mode::WHOLE_PAGES_BIT,
    SCATTERED = const Mode::SCATTERED_BIT,
    TAG = const TAG,
    SEED = const SEED,
    CONTENT_STEP = const CONTENT_STEP,
    CONTENT_ADD = const CONTENT_ADD,
    SCATTER_FIRST = const SCATTER_FIRST,
    SCATTER_SECOND = const SCATTER_SECOND,
    SPARSE_WORDS = const SPARSE_WORDS,
    BODY_WORD = const BODY_WORD,
    BODY_WORDS = const BODY_WORDS,
    SUM_WORD = const SUM_WORD,
    SUM = const SUM_WORD * 8,
    SUMS = const SUMS_WORD * 8,
    CONSOLE_PORT = const CONSOLE_PORT,
    REPORT_PORT = const REPORT_PORT,
    TASK_PORT = const TASK_PORT,
    TASK_COUNT = const TASK_COUNT,
);

// The guest program shifts page numbers by 12, and sums ten words at a time.
const _: () = assert!(WORDS * 8 == 1 << 12 && SUM_WORD.is_multiple_of(10));
// A page holds the worker's fields and a stack of a few words.
const _: () = assert!(size_of::<WorkerPage>() < 2048);
