"""The words of the report about files in other formats, in English and in Chinese; those of detectors apart."""

from __future__ import annotations

from collections.abc import Mapping

Texts = Mapping[str, str]

EN: Texts = {
    "exported": "Other formats",
    "exported_lead": "What lighten export made of this run, each file run in its own runtime on {0} report images. “Same answer” is the "
    "share of images that the file answers like the torch program it was written from. Time is the median of one image on one thread, memory "
    "the peak of a process of its own.",
    "exported_boxes_line": "Files with boxes inside: size, time and memory are the file's own, accuracy is that of the raw outputs that its boxes are made from.",
    "exported_format": "Format",
    "exported_precision": "Precision",
    "exported_mb": "MB",
    "exported_share": "of float32",
    "exported_same": "Same answer %",
    "exported_metric": "Accuracy",
    "exported_ms": "ms",
    "exported_status": "Status",
    "exported_PASS": "PASS",
    "exported_FAIL": "FAIL",
    "exported_failed": "failed",
    "exported_refused": "refused",
    "exported_missing": "tools missing",
    "exported_not run here": "not run here",
    "exported_least": "smallest that passed",
    "fell_back": "Differs from the plan: {0}",
    "fell_back_many": "Differs from the plan: {0} kinds of operators",
    "pixels_in": "uint8 pixels in",
    "boxes_out": "boxes out",
    "short_pixels": "pixels",
    "short_boxes": "boxes",
    "exported_plane_lead": "Files that passed, size against time: down is faster, left is smaller.",
    "exported_dots_lead": "Files that passed: left is faster.",
    "exported_unread": "{0} cannot be read: {1}. Move it away and run lighten export again.",
    "exported_damaged": "Entries of {0} that are damaged and left out: {1}.",
    "exported_foreign": "Entries of {0} that belong to another original model and are left out: {1}.",
}

ZH: Texts = {
    "exported": "其他格式",
    "exported_lead": "lighten export 由本次运行导出的文件，每个文件都在各自的运行时里用 {0} 张 report 图片实测。“答案一致”是文件与其来源 torch 程序答案相同的图片比例。"
    "时间是单线程、单张图片的中位数，内存是独立进程的峰值。",
    "exported_boxes_line": "内含检测框的文件：大小、时间和内存属于文件本身，指标按生成这些框的原始输出计算。",
    "exported_format": "格式",
    "exported_precision": "数值类型",
    "exported_mb": "MB",
    "exported_share": "占 float32",
    "exported_same": "答案一致 %",
    "exported_metric": "准确率",
    "exported_ms": "ms",
    "exported_status": "状态",
    "exported_PASS": "通过",
    "exported_FAIL": "未通过",
    "exported_failed": "失败",
    "exported_refused": "不支持",
    "exported_missing": "缺少工具",
    "exported_not run here": "未在本机运行",
    "exported_least": "通过的文件中最小",
    "fell_back": "与方案不同：{0}",
    "fell_back_many": "与方案不同的算子：{0} 种",
    "pixels_in": "输入 uint8 像素",
    "boxes_out": "输出检测框",
    "short_pixels": "像素",
    "short_boxes": "框",
    "exported_plane_lead": "通过的文件，大小与时间：越靠下越快，越靠左越小。",
    "exported_dots_lead": "通过的文件：越靠左越快。",
    "exported_unread": "无法读取 {0}：{1}。请移走它，再运行 lighten export。",
    "exported_damaged": "{0} 中已损坏而略去的条目：{1} 个。",
    "exported_foreign": "{0} 中属于另一个原始模型而略去的条目：{1} 个。",
}

DETECTOR_EN: Texts = {
    "exported_lead": "What lighten export made of this run, each file run in its own runtime on {0} report images. “Boxes again” is the "
    "share of the boxes of the torch program it was written from that the file finds again. Time is the median of one image on one thread, "
    "memory the peak of a process of its own.",
    "exported_boxes_line": "Files with boxes inside: size, time and memory are the file's own, mAP is that of the raw outputs that its boxes are made from.",
    "exported_same": "Boxes again %",
    "exported_metric": "mAP",
}

DETECTOR_ZH: Texts = {
    "exported_lead": "lighten export 由本次运行导出的文件，每个文件都在各自的运行时里用 {0} 张 report 图片实测。“框一致”是其来源 torch 程序的检测框被文件重新找到的比例。"
    "时间是单线程、单张图片的中位数，内存是独立进程的峰值。",
    "exported_boxes_line": "内含检测框的文件：大小、时间和内存属于文件本身，mAP 按生成这些框的原始输出计算。",
    "exported_same": "框一致 %",
    "exported_metric": "mAP",
}
