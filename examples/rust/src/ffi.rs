//! What this example uses of qlora_native/c_api.h. The library checks `struct_size`, so that a
//! struct that was written down wrongly is an error and no memory is touched.

use std::ffi::{c_char, c_void};

pub const OK: i32 = 0;
pub const FLOAT32: i32 = 0;
pub const CPU: i32 = 0;
pub const NF4: i32 = 0;
pub const WORKSPACE_ALIGNMENT: usize = 256;

#[repr(C)]
pub struct Weight {
    pub struct_size: u64,
    pub packed: *mut u8,
    pub absmax: *mut f32,
    pub absmax_codes: *mut u8,
    pub absmax2: *mut f32,
    pub offset: *mut f32,
    pub rows: i64,
    pub cols: i64,
    pub block_size: i64,
    pub custom_values: *const f32,
    pub quant_type: i32,
    pub device_type: i32,
    pub device_index: i32,
    pub reserved: i32,
}

#[repr(C)]
pub struct QuantizeArgs {
    pub struct_size: u64,
    pub input: *const c_void,
    pub output: *const Weight,
    pub pinned_offset: *const f32,
    pub dtype: i32,
    pub reserved: i32,
}

#[repr(C)]
pub struct MatmulArgs {
    pub struct_size: u64,
    pub x: *const c_void,
    pub m: i64,
    pub x_row_stride: i64,
    pub weight: *const Weight,
    pub bias: *const c_void,
    pub y: *mut c_void,
    pub y_row_stride: i64,
    pub dtype: i32,
    pub reserved: i32,
}

extern "C" {
    pub fn qn_version() -> *const c_char;
    pub fn qn_last_error_message() -> *const c_char;
    pub fn qn_quantize_4bit_workspace_bytes(args: *const QuantizeArgs, bytes: *mut i64) -> i32;
    pub fn qn_quantize_4bit(
        args: *const QuantizeArgs,
        workspace: *mut c_void,
        workspace_bytes: i64,
        stream: *mut c_void,
    ) -> i32;
    pub fn qn_matmul_4bit_workspace_bytes(args: *const MatmulArgs, bytes: *mut i64) -> i32;
    pub fn qn_matmul_4bit(
        args: *const MatmulArgs,
        workspace: *mut c_void,
        workspace_bytes: i64,
        stream: *mut c_void,
    ) -> i32;
}
