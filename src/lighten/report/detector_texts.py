"""The words of the report that a detector's needs beside the others, or instead of them, in English and in Chinese."""

from __future__ import annotations

from collections.abc import Mapping

from lighten.report import export_texts

Texts = Mapping[str, str]

EN: Texts = {
    # instead of what is said of classifiers
    "doubt": "mAP is COCO's: the mean over classes and over overlaps of 50 to 95%. It is measured on {0} images that the search "
    "never saw. ± is one standard error.",
    "tile_accuracy": "{0}50–95",
    "max_drop": "mAP loss, at most",
    "short_max_drop": "mAP",
    "pictures": "What is lost for size and speed",
    "pictures_lead": "Up is a higher mAP, left is cheaper. The line is the Pareto front: nothing measured beats a point on it in both "
    "directions. Bars are one standard error.",
    "classes_lead": "AP50–95 of each class before → after, on the report images. Left is worse, right is better, in points.",
    "flips": "Images with boxes, before and after",
    "flips_lead": "{0} of {1} report images ({2}%) are shown otherwise than by the original: a box more or less, another class, or a "
    "box that moved to an overlap under a half.",
    "flips_some": "Here are {0} of them, the most different first.",
    "before": "original",
    "after": "compressed",
    "lost": "finds fewer",
    "won": "finds more",
    "both": "other boxes",
    "guilty_lead": "Each layer alone at each precision, its weights and its input rounded, everything else in float. Damage is how far "
    "boxes and scores move in the raw outputs, as distillation measures it: a distance without a unit, on a logarithmic axis.",
    "guiltiest": "Worst at {1}: {0}, {2}, {3}% of what all layers do alone.",
    "axis_damage": "damage to the raw outputs (log)",
    "short_trials_line": "A short trial trains only long enough to tell plans apart: its mAP is not that of its recipe.",
    "matter_lead": "Each group of channels that can only go together, alone at the widths measured, the rest of the network as it "
    "was, batch norms re-estimated, nothing trained. Damage is how far boxes and scores move in the raw outputs.",
    "most_sensitive": "Most sensitive: {0}, damage {3} at {1} of {2} channels.",
    "small_first_lead": "Plans were compared by short trials of the whole recipe before any long training. Rank 1 is the least damage "
    "predicted, and the best mAP measured.",
    "predicted_damage": "Predicted damage",
    "agreement": "boxes found again {0}%, SQNR {1} dB, largest difference of a raw value {2}",
    # of detectors alone
    "same_boxes": "nothing changed",
    "flips_calm": "{0} where nothing changed are shown as well.",
    "flips_folded": "All {0}, {1} more",
    "objects": "{0} objects",
    "one_object": "1 object",
    "no_objects": "no object",
    "of_objects": "{0} of {1} found",
    "strays": "{0} wrong",
    "none_shown": "nothing found",
    "gone": "no longer shown",
    "new": "newly shown",
    "detail": "How well objects are found",
    "detail_lead": "On the report images. A box is right where it has the class of an object and overlaps it. AP50 asks for half an overlap, AP75 for three "
    "quarters; mAP50–95 is the mean over ten steps from 50 to 95%. Small objects have under 32 × 32 pixels of the input, large ones over "
    "96 × 96.",
    "metric": "Metric",
    "AP50": "AP50",
    "AP75": "AP75",
    "APsmall": "mAP, small objects",
    "APmedium": "mAP, medium objects",
    "APlarge": "mAP, large objects",
    "moved": "What became of the boxes",
    "moved_lead": "On the select images every box that is shown is held against the boxes of the other side. It has a partner where one of the same class "
    "overlaps it by a half or more. Positions and scores are told apart: boxes can move while their scores stay, and the other "
    "way round.",
    "moved_what": "Compared",
    "by_export": "export (fidelity)",
    "by_compression": "compression (drift)",
    "moved_n": "Boxes",
    "moved_again": "Found again %",
    "moved_partner": "With a partner %",
    "moved_iou": "Overlap of partners %",
    "moved_score": "Scores apart",
    "moved_again_line": "Found again is stricter than a partner: an overlap of 90% or more, and a score within 0.05.",
    "moved_said": "Compression: {0}% of the boxes keep a partner, partners overlap by {1}%, and their scores differ by {2} on average.",
    "moved_none": "Compression: no box of the original has a partner in the compressed file.",
    "moved_empty": "Neither side shows a box.",
    **export_texts.DETECTOR_EN,
}

ZH: Texts = {
    "doubt": "mAP 按 COCO 计算：对各类别以及 50% 到 95% 的重叠率取平均。它在搜索过程从未见过的 {0} 张图片上测得，± 为一个标准误差。",
    "tile_accuracy": "{0}50–95",
    "max_drop": "mAP 损失不超过",
    "short_max_drop": "mAP",
    "pictures": "体积与速度换来的 mAP 损失",
    "pictures_lead": "越靠上 mAP 越高，越靠左越省。折线是帕累托前沿：没有任何实测结果能在两个方向上同时胜过线上的点。误差线为一个标准误差。",
    "classes_lead": "每个类别在 report 图片上压缩前 → 压缩后的 AP50–95。向左变差，向右变好，单位为百分点。",
    "flips": "压缩前后的检测框",
    "flips_lead": "{1} 张 report 图片中有 {0} 张（{2}%）的显示结果与原始模型不同：多框或少框、类别不同，或框移动到重叠率不足一半。",
    "flips_some": "这里展示其中 {0} 张，差别最大的在前。",
    "before": "压缩前",
    "after": "压缩后",
    "lost": "找到的变少",
    "won": "找到的变多",
    "both": "框有变化",
    "guilty_lead": "每次只量化一层（它的权重和输入），其余全部保持浮点。损害指原始输出中框和得分偏移了多少，算法与蒸馏损失相同：没有单位的距离；横轴为对数坐标。",
    "guiltiest": "{1} 时最差的是 {0}：{2}，占各层单独损害之和的 {3}%。",
    "axis_damage": "对原始输出的损害（对数）",
    "short_trials_line": "短训练试验只训练到能分出方案优劣为止，它的 mAP 不代表该方案的最终 mAP。",
    "matter_lead": "必须一起删除的通道为一组。每次只把一组变窄到所测的宽度，网络其余部分不变，重新估计批归一化，不做任何训练。损害指原始输出中框和得分偏移了多少。",
    "most_sensitive": "最敏感的是 {0}：{2} 个通道保留 {1} 个时损害 {3}。",
    "small_first_lead": "在任何长时间训练之前，先用完整方案的短训练试验比较各个计划。名次 1 表示预测损害最小、实测 mAP 最高。",
    "predicted_damage": "预测损害",
    "agreement": "重新找到的框 {0}%，SQNR {1} dB，原始输出最大差 {2}",
    "same_boxes": "没有变化",
    "flips_calm": "另外展示 {0} 张没有变化的。",
    "flips_folded": "全部 {0} 张，另有 {1} 张",
    "objects": "{0} 个目标",
    "one_object": "1 个目标",
    "no_objects": "没有目标",
    "of_objects": "找到 {1} 个中的 {0} 个",
    "strays": "误检 {0} 个",
    "none_shown": "没有检出",
    "gone": "不再显示",
    "new": "新显示",
    "detail": "目标检测得怎么样",
    "detail_lead": "在 report 图片上测得。框的类别与目标一致并且与它重叠，才算检测正确。AP50 要求重叠率达到一半，AP75 要求四分之三；mAP50–95 是 50% 到 95% 十档的平均。"
    "小目标在输入图中不足 32 × 32 像素，大目标超过 96 × 96 像素。",
    "metric": "指标",
    "AP50": "AP50",
    "AP75": "AP75",
    "APsmall": "mAP，小目标",
    "APmedium": "mAP，中等目标",
    "APlarge": "mAP，大目标",
    "moved": "检测框有什么变化",
    "moved_lead": "在 select 图片上，把显示出来的每个框与另一方的框逐一对照：另一方有同类别、重叠率不低于一半的框，就算配对成功。位置和得分分开统计："
    "框可能移动而得分不变，反之亦然。",
    "moved_what": "对照",
    "by_export": "导出（保真度）",
    "by_compression": "压缩（漂移）",
    "moved_n": "框数",
    "moved_again": "重新找到 %",
    "moved_partner": "配对成功 %",
    "moved_iou": "配对框重叠率 %",
    "moved_score": "得分差",
    "moved_again_line": "“重新找到”比配对更严：重叠率不低于 90%，且得分相差不超过 0.05。",
    "moved_said": "压缩后：{0}% 的框配对成功，配对框平均重叠 {1}%，得分平均相差 {2}。",
    "moved_none": "压缩后：原始模型的框在压缩文件中没有一个能配对。",
    "moved_empty": "双方都没有显示任何框。",
    **export_texts.DETECTOR_ZH,
}

LANGUAGES = {"en": EN, "zh": ZH}
